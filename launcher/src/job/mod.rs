//! A job of several nodes: who decides (`coordinator`), and what nodes say to each other (`wire`).

pub mod coordinator;
pub mod wire;
