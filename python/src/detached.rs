//! What is dropped without the GIL.

use std::ops::Deref;

use pyo3::prelude::*;

/// A handle whose drop may deregister memory or destroy a queue pair, which takes up to milliseconds. If the thread that
/// drops it has the GIL, it releases the GIL meanwhile.
pub struct Detached<T: Send>(Option<T>);

impl<T: Send> From<T> for Detached<T> {
    fn from(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T: Send> Deref for Detached<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("taken only when it is dropped")
    }
}

impl<T: Send> Drop for Detached<T> {
    fn drop(&mut self) {
        let value = &mut self.0;
        // If Python has ended, the value is dropped as it is.
        let _ = Python::try_attach(|py| py.detach(|| drop(value.take())));
    }
}
