//! Compiles the C halves of the benchmarks.

fn main() {
    println!("cargo::rerun-if-changed=../register.c");
    // The same in every profile: a benchmark built for debugging must not have a slower peer.
    cc::Build::new()
        .file("../register.c")
        .opt_level(2)
        .debug(false)
        .warnings_into_errors(true)
        .compile("bench_bare");
}
