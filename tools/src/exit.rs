//! How a tool ends: what it says of an error, and its exit code.

use std::io::Write;

/// Done.
const DONE: i32 = 0;
/// The work failed.
const FAILURE: i32 = 1;
/// The options contradict each other (`EX_USAGE`).
const USAGE: i32 = 64;

/// Options that cannot be meant; the message says which, and what to do.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Tells an error on stderr; gives the exit code.
pub(crate) fn code_of(result: anyhow::Result<()>) -> i32 {
    let Err(error) = result else { return DONE };
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    if error.downcast_ref::<Usage>().is_some() { USAGE } else { FAILURE }
}
