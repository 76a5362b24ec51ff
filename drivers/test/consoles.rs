//! The consoles of guests in memory: each says that its guest has booted, and then whatever it is told.

use super::lock;
use crate::host::console::{BEHIND_IN_MEMORY, Clients, Talk, Transcript, stream};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;
use virt_model::driver::{ConsoleOptions, DriverError};

/// What each says first.
const BOOTED: &str = "booted\r\n";

/// Those of a guest.
#[derive(Default)]
pub struct Consoles {
    clients: Clients,
    /// By the alias of the device, those that somebody has been at.
    transcripts: Mutex<HashMap<String, Arc<Transcript>>>,
}

impl Consoles {
    /// Connects whoever asked; `ended` fires when the guest has.
    pub async fn open(
        &self,
        alias: &str,
        options: ConsoleOptions,
        ended: CancellationToken,
    ) -> Result<OwnedFd, DriverError> {
        let failed = |e: io::Error| DriverError::Internal(format!("no console: {e}"));
        let transcript = self.transcript(alias).map_err(failed)?;
        let admitted = self.clients.admit(alias, options.force).await.map_err(failed)?;
        let (client, admitted) = admitted.ok_or_else(|| DriverError::Refused("another client".to_owned()))?;
        let (line, guests) = UnixStream::pair().map_err(failed)?;
        let ready = line.set_nonblocking(true).and_then(|()| guests.set_nonblocking(true));
        let guests = ready.and_then(|()| tokio::net::UnixStream::from_std(guests)).map_err(failed)?;
        let line = Arc::new(stream(line.into()).map_err(failed)?);
        let talk = Talk::new(admitted, line, Some(transcript.clone()), options.log).map_err(failed)?;
        tokio::spawn(echo(guests, transcript));
        tokio::spawn(talk.run(async move { ended.cancelled().await }, drop));
        Ok(client)
    }

    fn transcript(&self, alias: &str) -> io::Result<Arc<Transcript>> {
        let mut transcripts = lock(&self.transcripts);
        if let Some(there) = transcripts.get(alias) {
            return Ok(there.clone());
        }
        let new = Arc::new(Transcript::in_memory(BEHIND_IN_MEMORY)?);
        new.append(BOOTED.as_bytes())?;
        transcripts.insert(alias.to_owned(), new.clone());
        Ok(new)
    }
}

/// Says what is told, until the line is closed.
async fn echo(mut line: tokio::net::UnixStream, transcript: Arc<Transcript>) {
    let mut block = [0; 4096];
    let say = async {
        while let Ok(count @ 1..) = line.read(&mut block).await {
            if transcript.append(&block[..count]).is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = say => {}
        () = transcript.stay_short() => {}
    }
}
