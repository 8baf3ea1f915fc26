//! Gives the shared library its soname, unless cargo-c does.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CAPI").is_none() {
        // A minor version of 0.x may break the interface.
        let version = [env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR")].join(".");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libdmabuf_rdma.so.{version}");
    }
}
