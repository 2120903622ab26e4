//! Every kernel against references in f64, against candle, and against itself on other threads.

#[cfg(test)]
mod activation;
#[cfg(test)]
mod attention;
#[cfg(test)]
mod elementwise;
#[cfg(test)]
mod layout;
#[cfg(test)]
mod loss;
#[cfg(test)]
mod norm;
#[cfg(test)]
mod optimizer;
#[cfg(test)]
mod reference;
