//! Tests of the `build.sh` in `kernel/rxe` and `kernel/dma_sg`, on small copies of what they look into. The guests
//! test what they build.

use crate::project;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with headers of a kernel and its rxe, removed when dropped.
struct Scene(PathBuf);

/// What `kernel/rxe` looks for in the files of rxe.
const RXE: &[(&str, &str)] = &[
    (
        "rxe_verbs.c",
        "#include \"rxe_hw_counters.h\"\n\tif (flags & IB_MR_REREG_PD) {\n\
         \t.reg_user_mr = rxe_reg_user_mr,\n\terr = ib_device_set_netdev(&rxe->ib_dev, ndev, 1);\n",
    ),
    ("rxe_verbs.h", "\tstruct ib_umem\t\t*umem;\n\tstruct rxe_mr_page\t*page_info;\n"),
    ("rxe_mr.c", "#include \"rxe_loc.h\"\n\tib_umem_release(mr->umem);\n\tkfree(mr->page_info);\n"),
    ("rxe_mmap.c", "\tstruct rxe_dev *rxe = to_rdev(ip->context->device);\n"),
    ("Makefile", ""),
];

impl Scene {
    fn new(name: &str) -> Scene {
        let root = std::env::temp_dir().join(format!("xtask-scripts-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let scene = Scene(root);
        scene.write(
            "headers/include/config/auto.conf",
            &format!("CONFIG_CC_VERSION_TEXT=\"{}\"\n", compiler()),
        );
        // make states a version, and "builds" an object file as the module.
        scene.write(
            "headers/Makefile",
            "kernelversion:\n\t@echo 6.12.117\nmodules:\n\t@echo messages of make\n\
             \t@echo 'int x;' | $(CC) -c -x c -o $(M)/$(notdir $(M:%/rxe=%/rdma_rxe)).ko -\n",
        );
        scene.write(
            "source/Makefile",
            "# SPDX\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 117\nEXTRAVERSION =\n",
        );
        for (file, text) in RXE {
            scene.write(&format!("source/drivers/infiniband/sw/rxe/{file}"), text);
        }
        scene
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.0.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Runs a `build.sh` in this folder; an error is its messages, without the name of the script.
    fn build(&self, folder: &str, arguments: &[&str]) -> Result<String, String> {
        self.run(&project::root().join("kernel").join(folder).join("build.sh"), arguments)
    }

    fn run(&self, script: &Path, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new("sh");
        let output =
            command.arg(script).args(arguments).current_dir(&self.0).env_remove("CC").output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => {
                Err(errors.trim_start_matches(&format!("{}: ", script.display())).trim_end().to_string())
            }
        }
    }

    #[track_caller]
    fn refused(&self, folder: &str, arguments: &[&str], sentence: &str) {
        let message = self.build(folder, arguments).unwrap_err();
        assert!(message.contains(sentence), "{message}");
        assert_eq!(message.lines().count(), 1, "one sentence: {message}");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The first line of this machine's compiler, as the kernel's configuration has it.
fn compiler() -> String {
    let output = Command::new("gcc").arg("--version").output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().next().unwrap().to_string()
}

#[test]
fn both_build_and_build_again() {
    let scene = Scene::new("build");
    for _ in 0..2 {
        assert!(scene.build("rxe", &["source", "headers", "out"]).unwrap().ends_with("/out/rdma_rxe.ko\n"));
        assert!(scene.build("dma_sg", &["headers", "out"]).unwrap().ends_with("/out/dma_sg.ko\n"));
    }
    let hooked = fs::read_to_string(scene.0.join("out/rxe/rxe_mr.c")).unwrap();
    assert!(hooked.contains("rxe_mr_release_umem(mr);") && hooked.contains("kvfree("), "{hooked}");
}

#[test]
fn an_archive_is_a_source() {
    let scene = Scene::new("archive");
    let tar = Command::new("tar").args(["-cf", "linux.tar", "source"]).current_dir(&scene.0).status();
    assert!(tar.unwrap().success());
    scene.build("rxe", &["linux.tar", "headers", "out"]).unwrap();
    scene.write("other.tar", "not an archive");
    scene.refused("rxe", &["other.tar", "headers", "out"], "other.tar is not a kernel source archive");
}

#[test]
fn nothing_is_removed_that_the_scripts_did_not_make() {
    let scene = Scene::new("keep");
    for folder in ["rxe", "dma_sg"] {
        let mine = format!("out/{folder}/mine.c");
        scene.write(&mine, "mine");
        let arguments: &[&str] =
            if folder == "rxe" { &["source", "headers", "out"] } else { &["headers", "out"] };
        scene.refused(folder, arguments, "exists, and this script did not make it");
        assert_eq!(fs::read_to_string(scene.0.join(mine)).unwrap(), "mine");
    }
    // The folder of the module itself, named from the folder above it.
    for file in ["dma_sg/build.sh", "dma_sg/main.c", "common.sh"] {
        scene.write(file, &fs::read_to_string(project::root().join("kernel").join(file)).unwrap());
    }
    let copy = scene.0.join("dma_sg/build.sh");
    assert!(scene.run(&copy, &["headers", "."]).unwrap_err().contains("did not make it"));
    assert!(scene.0.join("dma_sg/main.c").is_file());
}

#[test]
fn source_and_headers_have_one_version() {
    let scene = Scene::new("versions");
    scene.write("source/Makefile", "VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 118\nEXTRAVERSION =\n");
    scene.refused(
        "rxe",
        &["source", "headers", "out"],
        "SOURCE is Linux 6.12.118 and HEADERS are Linux 6.12.117; both must have the same version",
    );
    fs::remove_file(scene.0.join("source/Makefile")).unwrap();
    scene.refused("rxe", &["source", "headers", "out"], "SOURCE source has no Makefile");
}

#[test]
fn an_unknown_kernel_ends_with_one_sentence() {
    let scene = Scene::new("unknown");
    let arguments = ["source", "headers", "out"];
    // Linux 6.1 keeps pages in tables.
    scene.write("source/drivers/infiniband/sw/rxe/rxe_verbs.h", "\tstruct ib_umem\t\t*umem;\n");
    scene.refused("rxe", &arguments, "keeps the pages of a region in a way that rxe_dmabuf.c does not know");
    let text = RXE[1].1;
    scene.write("source/drivers/infiniband/sw/rxe/rxe_verbs.h", &format!("{text}{text}"));
    scene.refused("rxe", &arguments, "does not occur exactly once, so the hooks do not fit Linux 6.12.117");
    scene.write("source/drivers/infiniband/sw/rxe/rxe_verbs.h", text);

    let fails = "kernelversion:\n\t@echo 6.12.117\nmodules:\n\t$(error MESSAGE)\n";
    scene
        .write("headers/Makefile", &fails.replace("MESSAGE", "this kernel lacks it (no reg_user_mr_dmabuf)"));
    scene.refused("rxe", &arguments, "this kernel lacks it (no reg_user_mr_dmabuf)");
    scene.write("headers/Makefile", &fails.replace("MESSAGE", "No rule to make it"));
    scene.refused("rxe", &arguments, "rdma_rxe.ko does not compile for Linux 6.12.117 with ");
    scene.refused("dma_sg", &["headers", "out"], "dma_sg.ko does not compile for Linux 6.12.117 with ");
}

#[test]
fn the_compiler_is_the_one_that_built_the_kernel() {
    let scene = Scene::new("compiler");
    let built_by = |text: &str| {
        scene.write("headers/include/config/auto.conf", &format!("CONFIG_CC_VERSION_TEXT=\"{text}\"\n"));
    };
    // Ubuntu, Arch and Fedora.
    for text in [
        "x86_64-linux-gnu-gcc-99 (Ubuntu 99.3.0-6ubuntu2~24.04) 99.3.0",
        "gcc (GCC) 99.2.1 20250813",
        "gcc (GCC) 99.2.1 20250808 (Red Hat 99.2.1-1)",
    ] {
        built_by(text);
        scene.refused(
            "dma_sg",
            &["headers", "out"],
            &format!("\"{text}\" built this kernel; install gcc-99"),
        );
    }
    let major = Command::new("gcc").arg("-dumpversion").output().unwrap();
    let major = String::from_utf8(major.stdout).unwrap().trim().split('.').next().unwrap().to_string();
    for text in
        [format!("gcc (GCC) {major}.0.1 20250813"), format!("absent-gcc-{major} (Debian 1) {major}.0.1")]
    {
        built_by(&text);
        scene.build("dma_sg", &["headers", "out"]).unwrap();
    }
}
