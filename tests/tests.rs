//! Index of the tests that cross crates; the process tests run the `lorarun` binary.
//!
//! - `harness`: small runs on drawn pictures
//! - `layering`: direction of dependencies, size and promise of files
//! - `card_runs`: whole runs on an emulated card beside the CPU's
//! - `equality`: world sizes agree, runs repeat to the byte, checkpointing changes nothing
//! - `examples`: the example configs run as they are
//! - `hostile_input`: every kind of bad input gives one clear error and no partial file
//! - `interruption`: killed ranks, Ctrl-C, full disk
//! - `keys`: tensors and metadata of our files beside those of sd-scripts, and lossless continuing
//! - `machine`: what the binary needs to start, and what `doctor` finds
//! - `network_options`: dropouts and DyLoRA's ranks on any number of ranks; blocks, norms, merged files
//! - `networks`: LoHa, LoKr and DoRA train, agree on any number of ranks, go on from their files
//! - `optimizers`: whole runs with those that keep more than moments
//! - `plan`: what a run will take, told before it starts
//! - `quickstart`: the README's example
//! - `restarts`: killed ranks that are started again leave no trace; who may write, and who no longer
//! - `resume`: stopped or killed anywhere and resumed, a run ends with the bytes of one that was not
//! - `samples`: pictures while training, in runs of processes
//! - `sdxl`: its training, files and pictures on a small model
//! - `selftest`: agreement with the PyTorch reference, and that a changed reference is noticed
//! - `shapes`: what a generated picture shows, by plain arithmetic
//! - `text_cache`: captions encoded once, in memory and on disk, train the same LoRA to the bit
//! - `tiny_sd`: the small model's pictures, and what the quickstart's LoRA does to them
//! - `tools`: the offline tools as commands, beside sd-scripts' results
//! - `validation`: it changes nothing and is the same on any number of ranks; logs
//! - `watch`: steps that are not finite are left out; the average of the weights
//! - `world_sizes`: a run keeps its batch whatever number of processes goes on with it

mod card_runs;
mod equality;
mod examples;
mod harness;
mod hostile_input;
mod interruption;
mod keys;
mod layering;
mod machine;
mod network_options;
mod networks;
mod optimizers;
mod plan;
mod quickstart;
mod restarts;
mod resume;
mod samples;
mod sdxl;
mod selftest;
mod shapes;
mod text_cache;
mod tiny_sd;
mod tools;
mod validation;
mod watch;
mod world_sizes;
