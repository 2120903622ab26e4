//! The emulated card: what a card does, and errors where a card would hang, fault or be undefined.

#[cfg(test)]
mod collectives;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod graphs;
#[cfg(test)]
mod libraries;
#[cfg(test)]
mod trial;
