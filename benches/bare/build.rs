//! Compiles the C halves of the benchmarks.

fn main() {
    let sources = ["../peers/by_hand.c", "../register.c", "../sg.c"];
    for source in sources {
        println!("cargo::rerun-if-changed={source}");
    }
    // The same in every profile: a benchmark built for debugging must not have a slower peer.
    cc::Build::new()
        .files(sources)
        .opt_level(2)
        .debug(false)
        .warnings_into_errors(true)
        .compile("bench_bare");
}
