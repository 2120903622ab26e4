//! Index of the tests on several hosts, each with an address of its own.
//!
//! - `lab`: hosts in network namespaces: power cuts, pulled cables, partitions
//! - `jobs`: a job of several launchers, one on each host
//! - `hosts`: training and its failures on such hosts
//! - `slurm_lab`: a real Slurm of three nodes · `slurm`: training under it
//! - `manifests`: what is in `deploy/` and what `lorarun spec` makes
//!
//! They need root and iproute2. Where the machine forbids them, a test says so by name and loudly
//! (`SKIPPED`), unless `LORARUN_REQUIRE_LAB=1` makes that a failure.

#[path = "../harness/mod.rs"]
mod harness;
mod hosts;
mod jobs;
mod lab;
mod manifests;
mod slurm;
mod slurm_lab;
