//! What an exit code says to whoever started the process: launcher, scheduler, user.

/// The work is done.
pub const DONE: i32 = 0;
/// A failure without a code of its own.
pub const FAILURE: i32 = 1;
/// The command line is wrong; trying again cannot help.
pub const USAGE: i32 = 64;
/// Everything is saved; start me again to go on.
pub const REQUEUE: i32 = 75;
/// Configuration or environment is wrong; trying again cannot help.
pub const CONFIGURATION: i32 = 78;
/// Added to the number of the signal that ended a process.
pub const SIGNAL_BASE: i32 = 128;
