//! A job on one node or several: who decides (`coordinator`, by the words of `event` and what `watch`
//! sees), what nodes and coordinator say to each other (`wire`), the coordinator's side of that
//! (`hub`), a node's (`agent`, which finds the coordinator by `reach`), what everybody may know of it
//! (`table`), where ranks record their collectives (`flights`), and the options (`options`).

pub mod agent;
pub mod coordinator;
pub mod event;
pub mod flights;
pub mod hub;
pub mod options;
mod reach;
pub mod table;
pub mod watch;
pub mod wire;
