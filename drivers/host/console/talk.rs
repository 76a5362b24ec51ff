//! One client at a console, from its call until it leaves, is put out by another, or the guest ends.

use super::{Admitted, Stream, Transcript, is_closed};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// What a console says a byte at a time is gathered for so long.
const GATHER: Duration = Duration::from_millis(4);
/// What a client typed that has left is waited for so long, where the guest does not take it.
const LINGER: Duration = Duration::from_secs(2);
/// How long a client may take to read the rest when the guest has ended.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// A console of which there are so few bytes to be read says them one by one.
const SLOW: usize = 1 << 10;
/// Bytes moved at once.
const BLOCK: usize = 16 << 10;

/// A client and its console.
pub struct Talk {
    client: Admitted,
    /// Where it types.
    line: Arc<Stream>,
    transcript: Arc<Transcript>,
    /// What comes by the line is put into the transcript, which is this talk's alone.
    records: bool,
    /// Where in the transcript it began.
    at: u64,
    /// Something is on its way into the guest that the guest does not take yet.
    is_typing: AtomicBool,
}

impl Talk {
    /// That of a client at the console which ends at `line`. Its transcript is what the hypervisor writes; without, what
    /// comes by the line. `log`: what was kept comes first.
    pub fn new(
        client: Admitted,
        line: Arc<Stream>,
        transcript: Option<Arc<Transcript>>,
        log: bool,
    ) -> io::Result<Talk> {
        let records = transcript.is_none();
        let transcript = match transcript {
            Some(transcript) => transcript,
            None => Arc::new(Transcript::in_memory(super::BEHIND_IN_MEMORY)?),
        };
        let at = if log { transcript.shown_from()? } else { transcript.end()? };
        transcript.is_read_to(Some(at));
        Ok(Talk { client, line, transcript, records, at, is_typing: AtomicBool::new(false) })
    }

    /// Goes on to its end. `gone` returns when the guest has ended, and all is in the transcript that it said. `leave` gets
    /// the line, before anybody else can have the console.
    pub async fn run(self, gone: impl Future<Output = ()>, leave: impl FnOnce(Arc<Stream>)) {
        let over = CancellationToken::new();
        let guest_ends = async {
            gone.await;
            over.cancel();
            sleep(LAST_WORDS).await;
        };
        let tells = async {
            let told = self.tells(&over).await;
            // One that has left may have typed before.
            if told.is_err() && !over.is_cancelled() {
                std::future::pending::<()>().await;
            }
        };
        let short = async {
            match self.records {
                true => self.transcript.stay_short().await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.client.end.cancelled() => self.types_the_rest(),
            () = tells => {}
            () = self.hears() => {}
            () = guest_ends => {}
            () = self.drains() => {}
            () = short => {}
        }
        leave(self.line.clone());
    }

    /// Tells the client what the console says. Error: it has left.
    async fn tells(&self, over: &CancellationToken) -> io::Result<()> {
        let (mut at, mut block) = (self.at, vec![0; BLOCK]);
        loop {
            let ended = over.is_cancelled();
            let bytes = self.transcript.read(&mut at, &mut block)?;
            if !bytes.is_empty() {
                put(&self.client.socket, bytes, |fd, bytes| send(fd, bytes, SendFlags::NOSIGNAL)).await?;
                self.transcript.is_read_to(Some(at));
                // The answer to a key is told at once, and what follows it is gathered.
                if bytes.len() < SLOW && !ended {
                    sleep(GATHER).await;
                }
                continue;
            }
            let written = self.transcript.next_write();
            if self.transcript.end()? != at {
                continue;
            }
            if ended {
                return Ok(());
            }
            tokio::select! {
                () = written.done() => {}
                () = over.cancelled() => {}
            }
        }
    }

    /// Types what the client says. Ends when it has left and all of that is on its way.
    async fn hears(&self) {
        let typing = async {
            let mut block = vec![0; BLOCK];
            while let Ok(1..) = self.types(&mut block).await {}
        };
        let left = async {
            // The end of what it says is not that of what it hears.
            while !is_closed(&self.client.socket) {
                let Ok(mut ready) = self.client.socket.writable().await else { break };
                ready.clear_ready();
            }
            self.client.left.cancel();
        };
        let patience = async {
            self.client.left.cancelled().await;
            sleep(LINGER).await;
        };
        tokio::select! {
            _ = futures_util::future::join(typing, left) => {}
            () = patience => {}
        }
    }

    /// Types some of it; none at its end.
    async fn types(&self, block: &mut [u8]) -> io::Result<usize> {
        let count = take(&self.client.socket, |fd| recv(fd, &mut *block, RecvFlags::empty()).map(|(count, _)| count));
        let count = count.await?;
        self.is_typing.store(true, Ordering::Relaxed);
        // Where the hypervisor has closed the line, nobody hears it.
        let _ = put(&self.line, &block[..count], |fd, bytes| rustix::io::write(fd, bytes)).await;
        self.is_typing.store(false, Ordering::Relaxed);
        Ok(count)
    }

    /// Types what the client had said when another came, as far as the guest takes it now.
    fn types_the_rest(&self) {
        let mut block = [0; 4096];
        while !self.is_typing.load(Ordering::Relaxed)
            && let Ok((count @ 1.., _)) = recv(self.client.socket.get_ref(), &mut block, RecvFlags::DONTWAIT)
        {
            let typed = rustix::io::write(self.line.get_ref(), &block[..count]);
            self.is_typing.store(typed != Ok(count), Ordering::Relaxed);
        }
    }

    /// Reads what comes by the line, so that it does not fill. Never ends.
    async fn drains(&self) {
        drain(&self.line, |bytes| !self.records || self.transcript.append(bytes).is_ok()).await;
        std::future::pending::<()>().await;
    }
}

/// Reads what comes by a line until it ends, or `heard` is false.
pub(super) async fn drain(line: &Stream, heard: impl Fn(&[u8]) -> bool) {
    let mut block = vec![0; BLOCK];
    while let Ok(count @ 1..) = take(line, |fd| rustix::io::read(fd, &mut *block)).await {
        if !heard(&block[..count]) {
            return;
        }
        // A line holds hundreds of kilobytes, so what comes a byte at a time may wait.
        if count < SLOW {
            sleep(GATHER).await;
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.transcript.is_read_to(None);
        // What it has typed too late would otherwise be an error that it reads, instead of the end.
        let socket = self.client.socket.get_ref();
        let _ = shutdown(socket, Shutdown::Both);
        let mut block = [0; 4096];
        while let Ok((1.., _)) = recv(socket, &mut block, RecvFlags::DONTWAIT) {}
    }
}

/// Reads once there is something.
async fn take(from: &Stream, mut read: impl FnMut(&OwnedFd) -> Result<usize, Errno>) -> io::Result<usize> {
    loop {
        tokio::task::consume_budget().await;
        let mut ready = from.readable().await?;
        if let Ok(done) = ready.try_io(|from| Ok(read(from.get_ref())?)) {
            return done;
        }
    }
}

/// Writes all of it, as there is room.
async fn put(to: &Stream, mut bytes: &[u8], write: impl Fn(&OwnedFd, &[u8]) -> Result<usize, Errno>) -> io::Result<()> {
    while !bytes.is_empty() {
        tokio::task::consume_budget().await;
        // Tried first: that there is room may have been taken note of by somebody else.
        match write(to.get_ref(), bytes) {
            Err(Errno::AGAIN) => {
                let mut ready = to.writable().await?;
                if let Ok(done) = ready.try_io(|to| Ok(write(to.get_ref(), bytes)?)) {
                    bytes = &bytes[done?..];
                }
            }
            done => bytes = &bytes[done?..],
        }
    }
    Ok(())
}
