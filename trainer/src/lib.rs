//! One rank of one training run: configuration, dataset, objective, optimizer, the loop, checkpoints.

pub mod dataset;
pub mod metadata;
pub mod options;
pub mod progress;
pub mod tensorboard;
