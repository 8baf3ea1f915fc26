//! Moving ranges of any length between two devices.

mod moving;
mod refusals;
