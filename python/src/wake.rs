//! What tells an event loop which of its tasks to resume.
//!
//! A waker may be called from any thread, with or without the GIL, and must not take it. It notes a number and makes a
//! descriptor readable that the loop watches.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use pyo3::prelude::*;

use crate::error::Result;

/// The numbers of tasks to resume, of one event loop.
#[pyclass(frozen, module = "dmabuf_rdma._native")]
pub struct Wakes {
    shared: Arc<Shared>,
}

struct Shared {
    /// An eventfd.
    notice: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tokens: Vec<u64>,
    /// Whether the loop's thread is about to take the numbers, so that nobody need tell it.
    taking: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Wakes {
    #[new]
    fn new() -> PyResult<Self> {
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the descriptor is new, and nobody else has it.
        let notice = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { shared: Arc::new(Shared { notice, state: Mutex::default() }) })
    }

    /// The descriptor that is readable while there are numbers to take.
    fn fileno(&self) -> i32 {
        self.shared.notice.as_raw_fd()
    }

    /// Announces that `take` follows.
    fn begin(&self) {
        self.shared.lock().taking = true;
    }

    /// Takes the numbers.
    fn take(&self) -> Vec<u64> {
        let mut count = 0_u64;
        // SAFETY: an eventfd gives 8 bytes, and there is room for them. If it has none, the call fails.
        unsafe { libc::read(self.fileno(), (&raw mut count).cast(), 8) };
        let mut state = self.shared.lock();
        state.taking = false;
        std::mem::take(&mut state.tokens)
    }
}

impl Wakes {
    /// A waker that notes this number.
    pub fn waker(&self, token: u64) -> Waker {
        Waker::from(Arc::new(Note { shared: self.shared.clone(), token }))
    }
}

struct Note {
    shared: Arc<Shared>,
    token: u64,
}

impl Wake for Note {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = self.shared.lock();
        let first = state.tokens.is_empty() && !state.taking;
        state.tokens.push(self.token);
        if first {
            let one = 1_u64;
            // SAFETY: an eventfd takes 8 bytes. It fails only if its counter is full, and then it is readable anyway.
            unsafe { libc::write(self.shared.notice.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }
}

/// Wakes all tasks that wait for something that wakes one.
#[derive(Default)]
pub struct Everyone(Mutex<Vec<Waker>>);

impl Everyone {
    /// Adds a task until the next time. It must poll afterwards, or it may miss what came before.
    pub fn add(&self, waker: Waker) {
        self.lock().push(waker);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Everyone {
    fn wake(self: Arc<Self>) {
        let all = std::mem::take(&mut *self.lock());
        all.into_iter().for_each(Waker::wake);
    }
}

/// What an event loop watches: it makes progress, and tells in how many seconds the next timeout expires.
pub fn seconds_until(next: Option<std::time::Instant>) -> Option<f64> {
    next.map(|next| next.saturating_duration_since(std::time::Instant::now()).as_secs_f64())
}

/// The result of a poll: a tuple of the value, or nothing while it is pending.
pub type Polled<T> = Result<Option<(T,)>>;
