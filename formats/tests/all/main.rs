//! Tests of the crate from outside, one file per subject.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod base_models; // files, folders, families: every layout gives the same tensors
mod checkpoints; // torch checkpoints against what PyTorch itself wrote
mod hostile; // damaged and malicious input: an error each, never a panic
mod hub; // hub ids against a server in this process
mod layouts; // names and shapes of full-size models, files of holes
mod lora_files; // LoRA files of sd-scripts, hashes, determinism
mod model_files; // where every layer of a model lies
mod support;
