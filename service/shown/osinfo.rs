//! Short names of operating systems, as osinfo's database of this host has them.

use crate::lock::lock;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};
use virt_model::xml;

/// Where distributions keep it.
const SYSTEMS: &str = "/usr/share/osinfo/os";

/// The most names that are remembered: more than there are systems. Each is as short as the name of a file.
const MOST: usize = 4096;

/// The largest file that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// By URI; `None` is one that the database does not have.
static KNOWN: LazyLock<Mutex<HashMap<String, Option<String>>>> = LazyLock::new(Mutex::default);

/// The short name of a system, if it is known here.
pub(super) fn short_id(uri: &str) -> Option<String> {
    let file = file_of(Path::new(SYSTEMS), uri)?;
    if let Some(known) = lock(&KNOWN).get(uri) {
        return known.clone();
    }
    let found = look_up(&file, uri);
    let mut known = lock(&KNOWN);
    if known.len() < MOST {
        known.insert(uri.to_owned(), found.clone());
    }
    found
}

/// Looks into the one file that would have it.
#[allow(clippy::disallowed_methods, reason = "files of this host that every program reads")]
fn look_up(file: &Path, uri: &str) -> Option<String> {
    let is_small = std::fs::metadata(file).is_ok_and(|data| data.is_file() && data.len() <= LARGEST);
    let text = is_small.then(|| std::fs::read_to_string(file).ok())??;
    let root = xml::read(&text, &[]).ok()?;
    let system = root.elements().find(|os| os.name == "os" && os.attr("id") == Some(uri))?;
    Some(system.child("short-id")?.text().trim().to_owned()).filter(|name| !name.is_empty())
}

/// `http://debian.org/debian/12` is in `debian.org/debian-12.xml`. The URI is what somebody has written into a machine.
fn file_of(systems: &Path, uri: &str) -> Option<PathBuf> {
    let (host, system) = uri.strip_prefix("http://")?.split_once('/')?;
    let name = system.replace('/', "-");
    let plain = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        (1..100).contains(&part.len()) && !part.starts_with('.') && part.chars().all(known)
    };
    (plain(host) && plain(&name)).then(|| systems.join(host).join(format!("{name}.xml")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_looked_up_by_its_uri_and_nothing_else_is_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("example.org")).expect("a folder");
        let uri = "http://example.org/example/1.2";
        let system = format!("<libosinfo><os id='{uri}'><short-id>example1.2</short-id></os></libosinfo>");
        std::fs::write(folder.path().join("example.org/example-1.2.xml"), system).expect("written");
        let of = |uri: &str| look_up(&file_of(folder.path(), uri)?, uri);
        assert_eq!(of(uri).as_deref(), Some("example1.2"));
        assert_eq!(of("http://example.org/example/1.3"), None);
        for other in
            ["http://../x/y", "http://example.org/../../etc/passwd", "http://a/", "example.org/example/1.2", ""]
        {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(file_of(Path::new("/db"), "http://a.b/.hidden"), None);
    }

    #[test]
    fn what_cannot_be_in_the_database_is_not_remembered() {
        let long = format!("http://example.org/{}", "x".repeat(1 << 20));
        for uri in [&*long, "of nobody", "http://example.org/a b"] {
            assert_eq!(short_id(uri), None);
            assert!(!lock(&KNOWN).contains_key(uri), "{}", &uri[..9]);
        }
    }
}
