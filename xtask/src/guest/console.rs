//! Finds problems that the kernel reports on its console.

/// How a problem report starts, after the time stamp.
const STARTS: &[&str] = &[
    "WARNING: ",
    "BUG: ",
    "kernel BUG at ",
    "Oops",
    "Kernel panic",
    "Call Trace:",
    "------------[ cut here ]",
    "general protection fault",
    "watchdog: BUG: ",
    "INFO: rcu",
    "rcu: INFO: ",
    "INFO: task ",
    "INFO: trying to register non-static key",
    "UBSAN: ",
    "KASAN: ",
    "refcount_t: ",
    "list_add corruption",
    "list_del corruption",
    "double fault",
    "Out of memory: ",
];

/// `INFO: task ` also starts harmless messages.
fn harmless(message: &str) -> bool {
    message.starts_with("INFO: task ") && !message.contains("blocked for more than")
}

/// Written to the console by tests of failing allocations, before and after. In between, a message about a failed
/// allocation and its call trace are no problem.
const ON_PURPOSE: &str = "allocations fail on purpose";
const NO_MORE: &str = "allocations fail no more";

/// Lines to show of each report.
const CONTEXT: usize = 40;
/// Lines to show of all reports.
const LIMIT: usize = 120;

/// The lines of all problem reports.
pub fn problems(console: &str) -> Vec<String> {
    let mut shown = Vec::new();
    let mut left = 0;
    let (mut on_purpose, mut failed) = (false, false);
    for line in console.lines() {
        let message = message(line);
        on_purpose = message == ON_PURPOSE || on_purpose && message != NO_MORE;
        let failures = [": page allocation failure: order:", ": vmalloc error: size "];
        failed |= on_purpose && failures.iter().any(|text| message.contains(text));
        let trace = message.starts_with("Call Trace:");
        if is_problem(line) && !(trace && failed) {
            left = CONTEXT;
        }
        failed &= !trace;
        if left > 0 && shown.len() < LIMIT {
            shown.push(line.trim_end().to_string());
            left -= 1;
            if line.contains("---[ end trace") {
                left = 0;
            }
        }
    }
    shown
}

/// Whether this line starts a problem report.
pub fn is_problem(line: &str) -> bool {
    let message = message(line);
    STARTS.iter().any(|start| message.starts_with(start)) && !harmless(message)
}

/// Whether this line reports a panic, after which the kernel stops.
pub fn is_fatal(line: &str) -> bool {
    message(line).starts_with("Kernel panic")
}

/// The text after `[    1.234567] ` or `[    1.234567][  T123] `.
fn message(mut line: &str) -> &str {
    while let Some(rest) = line.strip_prefix('[') {
        match rest.split_once(']') {
            Some((stamp, rest)) if stamp.chars().all(|c| c.is_ascii_alphanumeric() || " .".contains(c)) => {
                line = rest.trim_start();
            }
            _ => break,
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_boot_has_no_problems() {
        let console = "\
[    0.000000] Linux version 6.12.117+deb12-amd64
[    0.100000] Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on
[    1.000000] rdma_rxe: loading out-of-tree module taints kernel.
[    1.100000] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable
[    2.000000] workqueue: drm_fb_helper_damage_work hogged CPU for >10000us 4 times
";
        assert_eq!(problems(console), Vec::<String>::new());
    }

    #[test]
    fn each_kind_of_problem_is_found() {
        for line in [
            "[    5.1] WARNING: CPU: 1 PID: 77 at drivers/infiniband/sw/rxe/rxe_mr.c:12 rxe_x+0x1/0x2 [rdma_rxe]",
            "[    5.1] WARNING: drivers/infiniband/sw/rxe/rxe_mr.c:12 at rxe_x+0x1/0x2, CPU#1: sh/77",
            "[    5.1][   T77] BUG: unable to handle page fault for address: ffff888000000000",
            "[    5.1] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI",
            "[    5.1] Kernel panic - not syncing: Fatal exception",
            "[  250.1] INFO: task demo:99 blocked for more than 120 seconds.",
            "[   60.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[    5.1] BUG: KFENCE: use-after-free read in rxe_x+0x1/0x2 [rdma_rxe]",
            "[    5.1] BUG: KASAN: slab-use-after-free in rxe_x+0x1/0x2 [rdma_rxe]",
            "[    5.1] BUG: kmemleak: unreferenced object 0xffff888000000000 (size 64):",
            "[    5.1] WARNING: possible circular locking dependency detected",
            "[    5.1] BUG: sleeping function called from invalid context at mm/x.c:1",
            "[    5.1] INFO: trying to register non-static key.",
            "[   60.1] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [x:1]",
        ] {
            assert!(is_problem(line), "{line}");
        }
        assert!(is_fatal("[    5.1] Kernel panic - not syncing: Fatal exception"));
    }

    #[test]
    fn an_allocation_that_fails_on_purpose_is_no_problem() {
        let failure =
            "[ 1.0] x: page allocation failure: order:0, mode:0x0\n[ 1.0] CPU: 1\n[ 1.0] Call Trace:\n";
        assert!(!problems(failure).is_empty());
        let injected = format!("[ 1.0] {ON_PURPOSE}\n{failure}");
        assert_eq!(problems(&injected), Vec::<String>::new());
        for after in
            ["[ 1.0] Call Trace:\n", &format!("[ 1.0] {NO_MORE}\n{failure}"), "[ 1.0] BUG: KASAN: x\n"]
        {
            assert!(!problems(&format!("{injected}{after}")).is_empty(), "{after}");
        }
    }

    #[test]
    fn a_report_is_shown_to_its_end() {
        let console = "a\n[ 1.0] ------------[ cut here ]------------\n[ 1.0] WARNING: CPU: 0\n\
                       [ 1.0] more\n[ 1.0] ---[ end trace 0000000000000000 ]---\n[ 2.0] after\n";
        let shown = problems(console);
        assert_eq!(shown.len(), 4);
        assert!(shown[3].contains("end trace"));
    }
}
