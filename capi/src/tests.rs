//! What C cannot show: panics, the reuse of slots, and the cost of a call.

mod bench;

use std::ptr::without_provenance;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::handle::{self, Handle, Table};
use crate::status::{Failed, call, drdma_last_message, drdma_last_status, drdma_status, query};

use drdma_status::{DRDMA_MISUSE, DRDMA_OK, DRDMA_PENDING, DRDMA_SYSTEM};

/// A type of handle with each use of the macro.
macro_rules! test_handle {
    ($name:ident, $tag:literal, $object:ty) => {
        #[allow(non_camel_case_types)]
        struct $name(());

        impl Handle for $name {
            type Object = $object;
            const NAME: &'static str = stringify!($name);
            const TAG: u64 = $tag;

            fn table() -> &'static Table<Self::Object> {
                static TABLE: Table<$object> = Table::new();
                &TABLE
            }
        }
    };
}
use test_handle;

fn message() -> String {
    let mut text = [0_u8; 300];
    // SAFETY: the buffer has so many bytes.
    let length = unsafe { drdma_last_message(text.as_mut_ptr().cast(), text.len()) };
    String::from_utf8(text[..length.min(text.len() - 1)].to_vec()).unwrap()
}

#[test]
fn a_panic_becomes_a_status() {
    struct Loud;
    impl Drop for Loud {
        fn drop(&mut self) {
            panic!("the payload too");
        }
    }
    assert_eq!(call(|| panic!("an index of {} is wrong", 7)), DRDMA_SYSTEM);
    assert_eq!(message(), "the library has a bug: an index of 7 is wrong");
    assert_eq!(query(5, || std::panic::panic_any(Loud)), 5);
    assert_eq!(
        (drdma_last_status(), message().as_str()),
        (DRDMA_SYSTEM, "the library has a bug: it panicked")
    );
    // No failure, and no success that forgets one.
    assert_eq!(call(|| Err(Failed::pending())), DRDMA_PENDING);
    assert_eq!(call(|| Ok(())), DRDMA_OK);
    assert_eq!(drdma_last_status(), DRDMA_SYSTEM);
}

#[test]
fn an_object_whose_drop_panics_is_gone() {
    struct Bad;
    impl Drop for Bad {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }
    test_handle!(bad, 15, Bad);
    let one = handle::new::<bad>(Bad).ok().unwrap();
    assert_eq!(call(|| handle::release(one)), DRDMA_SYSTEM);
    assert!(message().ends_with("in a destructor"));
    assert_eq!(call(|| handle::release(one)), DRDMA_MISUSE);
    assert_eq!(bad::table().live(), 0);
}

/// Whatever C calls, it is caught: each exported function is one `call` or `query`.
#[test]
fn every_exported_function_catches_panics() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    let mut functions = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() || path.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for item in text.split("#[unsafe(no_mangle)]\n").skip(1) {
            let (head, body) = item.split("\n}\n").next().unwrap().split_once("{\n").unwrap();
            assert!(head.contains("extern \"C\" fn drdma_"), "{head}");
            let statements: Vec<&str> =
                body.lines().filter(|line| line.starts_with("    ") && !line.starts_with("     ")).collect();
            let caught = |line: &&str| {
                ["    call(|| ", "    query("].iter().any(|start| line.starts_with(start))
                    || ["    //", "    })", "    let keeper = "].iter().any(|start| line.starts_with(start))
            };
            assert!(statements.iter().all(caught), "{head}: {statements:?}");
            assert!(body.contains("call(||") || body.contains("query("), "{head}");
            functions += 1;
        }
    }
    let listed = include_str!("../../docs/api/libdmabuf_rdma.txt").lines().count() - 1;
    assert_eq!(functions, listed);
}

#[test]
fn a_slot_is_used_again_and_its_old_handles_are_not() {
    test_handle!(number, 14, u32);
    let first = handle::new::<number>(1).ok().unwrap();
    let mut old = Vec::new();
    for round in 0..1000 {
        let next = handle::new::<number>(round).ok().unwrap();
        assert_eq!(call(|| handle::release(next)), DRDMA_OK);
        assert_eq!(call(|| handle::reference(next)), DRDMA_MISUSE);
        old.push(next);
    }
    let last = handle::new::<number>(7).ok().unwrap();
    // SAFETY: whoever is refused is not followed.
    assert!(old.iter().all(|&old| unsafe { handle::get(old) }.is_err()));
    // SAFETY: both have a reference.
    assert_eq!(unsafe { (*handle::get(first).ok().unwrap(), *handle::get(last).ok().unwrap()) }, (1, 7));
    // One slot for the first, and one for all others.
    assert_eq!(first.addr() & 0xffff_ffff, 14);
    assert!(old.iter().all(|old| old.addr() & 0xffff_ffff == 1 << 4 | 14));
    for handle in [first, last] {
        assert_eq!(call(|| handle::release(handle)), DRDMA_OK);
    }
    for address in [8, 14, usize::MAX, 0x7fff_ffff_ffff] {
        // SAFETY: whoever is refused is not followed.
        assert!(unsafe { handle::get::<number>(without_provenance(address)) }.is_err(), "{address:#x}");
    }
}

#[test]
fn a_slot_whose_generations_are_used_up_rests() {
    test_handle!(tired, 13, ());
    let first = handle::new::<tired>(()).ok().unwrap();
    assert_eq!(call(|| handle::release(first)), DRDMA_OK);
    tired::table().skip_to(0, u32::MAX);
    let last = handle::new::<tired>(()).ok().unwrap();
    assert_eq!(last.addr() >> 32, u32::MAX as usize);
    assert_eq!(call(|| handle::release(last)), DRDMA_OK);
    assert_eq!(call(|| handle::release(last)), DRDMA_MISUSE);
    let next = handle::new::<tired>(()).ok().unwrap();
    assert_eq!(next.addr() & 0xffff_ffff, 1 << 4 | 13, "another slot");
}

/// More objects than the first segments have room for; references from many threads; each object is dropped once.
#[test]
fn threads_take_and_release_references() {
    struct Counted(Arc<AtomicUsize>, usize);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    test_handle!(counted, 12, Counted);
    const EACH: usize = if cfg!(miri) { 40 } else { 1000 };
    let dropped = Arc::new(AtomicUsize::new(0));
    let shared = handle::new::<counted>(Counted(dropped.clone(), usize::MAX)).ok().unwrap().addr();
    thread::scope(|scope| {
        for thread in 0..4 {
            let dropped = &dropped;
            scope.spawn(move || {
                let shared = without_provenance::<counted>(shared);
                let mut all = Vec::new();
                for at in 0..EACH {
                    assert!(handle::reference(shared).is_ok());
                    all.push(
                        handle::new::<counted>(Counted(dropped.clone(), thread * EACH + at)).ok().unwrap(),
                    );
                    // SAFETY: this thread has a reference.
                    assert_eq!(unsafe { handle::get(shared) }.ok().unwrap().1, usize::MAX);
                    assert!(handle::release(shared).is_ok());
                }
                for (at, handle) in all.into_iter().enumerate() {
                    // SAFETY: this thread has the only reference.
                    assert_eq!(unsafe { handle::get(handle) }.ok().unwrap().1, thread * EACH + at);
                    assert!(handle::release(handle).is_ok() && handle::release(handle).is_err());
                }
            });
        }
    });
    assert_eq!((dropped.load(Ordering::Relaxed), counted::table().live()), (4 * EACH, 1));
    assert!(handle::release::<counted>(without_provenance(shared)).is_ok());
    assert_eq!((dropped.load(Ordering::Relaxed), counted::table().live()), (4 * EACH + 1, 0));
}
