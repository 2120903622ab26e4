//! The operations of a card, run by the emulated one.

#[cfg(test)]
mod captures;
#[cfg(test)]
mod operations;
#[cfg(test)]
mod params;
#[cfg(test)]
mod places;
