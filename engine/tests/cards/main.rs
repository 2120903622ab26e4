//! The operations of a card, run by the emulated one.

#[cfg(test)]
mod operations;
