//! A job of several nodes: who decides (`coordinator`), what nodes and coordinator say to each other
//! (`wire`), the coordinator's side of that (`hub`), a node's (`agent`), and the options (`options`).

pub mod agent;
pub mod coordinator;
pub mod hub;
pub mod options;
pub mod wire;
