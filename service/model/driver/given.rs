//! Files that clients have open themselves, and give with their calls.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A file that a client has given. Nobody has judged it: it may be of any kind, and of a file system that never answers. So
/// whatever is done with it may block, except to hand it on.
pub struct GivenFile {
    file: Option<OwnedFd>,
    close: Option<Close>,
}

/// Closes it, without waiting.
type Close = Box<dyn FnOnce(OwnedFd) + Send + Sync>;

impl GivenFile {
    /// A file that has come in; `close`, which must not wait, gets it when it is dropped.
    pub fn new(file: OwnedFd, close: impl FnOnce(OwnedFd) + Send + Sync + 'static) -> GivenFile {
        GivenFile { file: Some(file), close: Some(Box::new(close)) }
    }
}

impl AsFd for GivenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let Some(file) = &self.file else { unreachable!("it is there until it is dropped") };
        file.as_fd()
    }
}

/// One is another only if it is the very same.
impl PartialEq for GivenFile {
    fn eq(&self, other: &GivenFile) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for GivenFile {}

impl fmt::Debug for GivenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file of a client")
    }
}

impl Drop for GivenFile {
    fn drop(&mut self) {
        if let (Some(file), Some(close)) = (self.file.take(), self.close.take()) {
            close(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn it_is_closed_by_whom_it_came_from() {
        let (close, closed) = mpsc::channel();
        let (ear, mouth) = std::io::pipe().unwrap();
        let given = GivenFile::new(mouth.into(), move |file| close.send(file).unwrap());
        assert!(given.as_fd().try_clone_to_owned().is_ok() && closed.try_recv().is_err());
        drop(given);
        drop(closed.try_recv().unwrap());
        assert_eq!(std::io::read_to_string(ear).unwrap(), "");
    }
}
