//! A job of several nodes: who decides (`coordinator`).

pub mod coordinator;
