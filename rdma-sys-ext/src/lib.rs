//! The raw layer.
