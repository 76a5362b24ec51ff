//! A file system that never answers, as a server that has gone leaves it: whoever looks into it waits until it is let go.

use super::{Daemon, skip};
use std::fs::File;
use std::path::PathBuf;

/// A mounted file system whose server reads no question. When it is dropped all who wait get an error.
pub struct Dead {
    /// Where it is, for virtd.
    pub folder: PathBuf,
    server: Option<File>,
}

impl Dead {
    /// Mounts one where `daemon` sees it, and nobody else. `None` if that cannot be had here (and says so).
    pub fn mount(daemon: &Daemon) -> Option<Dead> {
        let folder = daemon.folder().join("dead");
        std::fs::create_dir(&folder).unwrap();
        let server = File::options().read(true).write(true).open("/dev/fuse");
        let server = server.inspect_err(|e| skip(&format!("/dev/fuse: {e}"))).ok()?;
        // The kernel's end is the server's descriptor, whoever hands it over.
        let mut mount = daemon.inside("mount");
        mount.args(["--internal-only", "-t", "fuse", "-o"]);
        mount.arg("fd=0,rootmode=40000,user_id=0,group_id=0,allow_other").arg("dead").arg(&folder);
        let done = mount.stdin(server.try_clone().unwrap()).output().unwrap();
        if !done.status.success() {
            skip(&format!("no FUSE here: {}", String::from_utf8_lossy(&done.stderr).trim()));
            return None;
        }
        Some(Dead { folder, server: Some(server) })
    }

    /// A path in it.
    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Whoever waits gets an error, as when an administrator forces it off.
    pub fn let_go(&mut self) {
        self.server = None;
    }
}
