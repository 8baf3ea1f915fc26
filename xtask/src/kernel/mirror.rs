//! For tests: a small Debian mirror on this machine, with real packages, which apt reads over HTTP. It can also be the
//! proxy for another name, and cut transfers short.

use crate::{lock, process};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// The release that the mirror has.
pub const RELEASE: &str = "trixie";

pub struct Mirror {
    /// For the tests' own files too; removed when dropped.
    pub folder: PathBuf,
    pub port: u16,
    /// The first lines of all requests.
    pub requests: Arc<Mutex<Vec<String>>>,
    /// How many of the next packages are cut in the middle.
    pub cut: Arc<AtomicU32>,
}

impl Mirror {
    /// A mirror with packages, each a name and the fields of its control file.
    pub fn new(packages: &[(&str, &str)]) -> Mirror {
        let folder =
            lock::new_folder(&std::env::temp_dir(), |unique| format!("xtask-mirror-{unique}")).unwrap();
        let list = format!("dists/{RELEASE}/main/binary-amd64/Packages");
        let write = |name: &str, text: &str| {
            let path = folder.join("debian").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let sha256 = |name: &str| {
            let text =
                process::output(Command::new("sha256sum").arg(folder.join("debian").join(name))).unwrap();
            text.split(' ').next().unwrap().to_string()
        };
        let size = |name: &str| fs::metadata(folder.join("debian").join(name)).unwrap().len();
        let mut entries = String::new();
        for (name, fields) in packages {
            let control = format!(
                "Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: Nobody <n@example>\n{fields}\
                 Description: for a test\n"
            );
            let tree = folder.join("tree").join(name);
            fs::create_dir_all(tree.join("DEBIAN")).unwrap();
            fs::write(tree.join("DEBIAN/control"), &control).unwrap();
            // Enough for a cut in the middle.
            fs::write(tree.join("file"), name.repeat(10_000)).unwrap();
            let deb = format!("pool/{name}_1_amd64.deb");
            write(&deb, "");
            process::output(
                Command::new("dpkg-deb")
                    .args(["-Znone", "--root-owner-group", "-b"])
                    .arg(&tree)
                    .arg(folder.join("debian").join(&deb)),
            )
            .unwrap();
            entries +=
                &format!("{control}Filename: {deb}\nSize: {}\nSHA256: {}\n\n", size(&deb), sha256(&deb));
        }
        write(&list, &entries);
        let (_, inside) = list.split_once(&format!("{RELEASE}/")).unwrap();
        write(
            &format!("dists/{RELEASE}/Release"),
            &format!(
                "Suite: {RELEASE}\nCodename: {RELEASE}\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nArchitectures: amd64\n\
                 Components: main\nSHA256:\n {} {} {inside}\n",
                sha256(&list),
                size(&list)
            ),
        );
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mirror = Mirror { folder, port, requests: Arc::default(), cut: Arc::default() };
        let (root, requests, cut) = (mirror.folder.clone(), mirror.requests.clone(), mirror.cut.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &root, &requests, &cut);
            }
        });
        mirror
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/debian", self.port)
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// Answers one request and closes the connection.
fn answer(
    mut stream: TcpStream,
    root: &Path,
    requests: &Mutex<Vec<String>>,
    cut: &AtomicU32,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let target = first.split(' ').nth(1).unwrap_or_default();
    // A proxy hears the whole address.
    let path =
        target.strip_prefix("http://").map_or(target, |rest| rest.find('/').map_or("", |at| &rest[at..]));
    let content = fs::read(root.join(path.trim_start_matches('/')));
    requests.lock().unwrap().push(first.clone());
    let Ok(content) = content else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", content.len());
    stream.write_all(head.as_bytes())?;
    let cuts =
        path.ends_with(".deb") && cut.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok();
    stream.write_all(if cuts { &content[..content.len() / 2] } else { &content })
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
