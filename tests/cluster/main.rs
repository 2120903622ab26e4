//! Index of the tests on several hosts, each with an address of its own.
//!
//! - `lab`: hosts in network namespaces: power cuts, pulled cables, partitions
//! - `jobs`: a job of several launchers, one on each host
//! - `hosts`: training and its failures on such hosts
//!
//! They need root and iproute2. Where the machine forbids them, a test says so by name and loudly
//! (`SKIPPED`), unless `LORARUN_REQUIRE_LAB=1` makes that a failure.

#[path = "../harness/mod.rs"]
mod harness;
mod hosts;
mod jobs;
mod lab;
