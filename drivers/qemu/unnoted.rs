//! Finding a QEMU of whose process nothing is noted, or nothing that can be read: it holds the socket of its monitor, whether
//! it answers there or not. Nobody else has that, since the socket was made for it in a folder where only virtd writes.

use crate::host::process::Identity;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use uuid::Uuid;

/// The process that holds the monitor's socket; `None`: there is none, and no other that calls itself QEMU of that uuid.
/// Error: it cannot be told, or there is such another. Blocks.
pub fn holder(monitor: &Path, uuid: Uuid) -> io::Result<Option<Identity>> {
    let sockets = sockets_at(monitor)?;
    let (mut holder, mut namesake) = (None, None);
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if holds(pid, &sockets) {
            // Who has that number after it was asked, and still holds the socket, is who was meant.
            let identity = Identity::of(pid).ok().filter(|_| holds(pid, &sockets));
            holder = holder.or(identity);
        } else if is_called(pid, uuid) {
            namesake = Some(pid);
        }
    }
    match (holder, namesake) {
        (None, Some(pid)) => Err(io::Error::other(format!(
            "process {pid} runs a machine with this uuid, and does not listen at {}",
            monitor.display()
        ))),
        (holder, _) => Ok(holder),
    }
}

/// What `/proc/PID/fd` calls the sockets that were bound to this path, connections to them included.
fn sockets_at(path: &Path) -> io::Result<BTreeSet<String>> {
    let table = std::fs::read("/proc/net/unix")?;
    let path = path.to_string_lossy();
    let of_line = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(6);
        let inode = fields.next()?;
        line.ends_with(&format!(" {path}")).then(|| format!("socket:[{inode}]"))
    };
    Ok(String::from_utf8_lossy(&table).lines().filter_map(of_line).collect())
}

/// Whether the process has one of them open. One that has gone, or is another user's, has none.
fn holds(pid: i32, sockets: &BTreeSet<String>) -> bool {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    !sockets.is_empty() && links.any(|link| link.to_str().is_some_and(|link| sockets.contains(link)))
}

/// Whether its arguments say that it is a machine with this uuid.
fn is_called(pid: i32, uuid: Uuid) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| pair[0] == b"-uuid" && pair[1] == uuid.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_holder_of_a_socket_is_found_whether_it_answers_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("monitor.sock");
        let uuid = Uuid::new_v4();
        assert!(holder(&path, uuid).unwrap().is_none(), "nothing there");
        let listener = UnixListener::bind(&path).unwrap();
        let found = holder(&path, uuid).unwrap().unwrap();
        assert_eq!(found.pid, std::process::id().cast_signed());
        drop(listener);
        assert!(holder(&path, uuid).unwrap().is_none(), "a socket that nobody holds is no process");
    }

    #[test]
    fn a_process_that_says_it_is_the_machine_and_holds_nothing_is_told() {
        let uuid = Uuid::new_v4();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo up; read _", "sh", "-uuid", &uuid.to_string()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its arguments are in their place only when it runs.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        let told = holder(Path::new("/nowhere/monitor.sock"), uuid);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(told.unwrap_err().to_string().contains(&format!("process {}", child.id())));
    }
}
