//! Gradients of the tape against differences in f64 and against candle, segments, callbacks.

#[cfg(test)]
mod adapters;
#[cfg(test)]
mod dropouts;
#[cfg(test)]
mod layers;
#[cfg(test)]
mod operations;
#[cfg(test)]
mod segments;
#[cfg(test)]
mod trial;
