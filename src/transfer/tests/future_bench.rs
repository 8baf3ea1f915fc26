//! What a future costs natively beside a blocking wait, where both sleep until another thread completes the request:
//! `cargo xtask bench post`.

use std::sync::atomic::AtomicBool;
use std::task::Wake;
use std::time::{Duration, Instant};

use super::lifetimes::{Fake, Setup};
use super::*;
use crate::tests::common::{Result, Rows, Spread};
use crate::verbs::CompletionStatus;

const PAIRS: usize = 2001;
const QP_NUM: u32 = 5;
/// From the request to its completion: both sides sleep by then.
const DELAY: Duration = Duration::from_micros(50);

#[test]
#[ignore = "a benchmark: cargo xtask bench post"]
fn future() -> Result<()> {
    let setup = Setup::new(100);
    let pair = setup.pair(QP_NUM);
    let (provider, engine, stop) = (setup.provider, setup.engine.clone(), AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut added = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| complete_each(provider, &engine, &stop));
        let blocking = || {
            let start = Instant::now();
            setup.write(&pair).wait().unwrap();
            start.elapsed()
        };
        let awaited = || {
            runtime.block_on(async {
                let start = Instant::now();
                setup.write(&pair).await.unwrap();
                start.elapsed()
            })
        };
        let nanos = |time: Duration| time.as_nanos() as f64;
        for turn in 0..PAIRS {
            let (waited, future) = if turn % 2 == 0 {
                let waited = blocking();
                (waited, awaited())
            } else {
                let future = awaited();
                (blocking(), future)
            };
            added.push(nanos(future) - nanos(waited));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut rows = Rows::new()?;
    rows.add("a future, beside a wait", "ns", Spread::of(added.into_iter()), None, Some("value <= 1000"))
}

/// Completes each request some time after it was posted, and wakes who sleeps.
fn complete_each(provider: &Fake, engine: &Engine, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let Some(posted) = provider.lock().unwrap().posted.pop() else {
            thread::yield_now();
            continue;
        };
        let start = Instant::now();
        while start.elapsed() < DELAY {
            std::hint::spin_loop();
        }
        provider.lock().unwrap().completions.push_back((posted, CompletionStatus::SUCCESS.0, QP_NUM));
        engine.events.clone().wake();
    }
}
