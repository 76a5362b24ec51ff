//! A volume that is served by NBD: a thread of its own follows its server, which has the files for as long.

use crate::host::image::LentFromAfar;
use crate::host::nbd::Export;
use rustix::pipe::{PipeFlags, pipe_with};
use std::path::PathBuf;
use tokio::sync::oneshot;
use virt_model::driver::DriverError;
use virt_model::driver::storage::Served;

/// Serves an image, whose files are lent, as soon as somebody is there who does. `place` is as of [`Export::serve`].
pub async fn begin(export: Export, lent: LentFromAfar, place: PathBuf) -> Result<Served, DriverError> {
    let failed = |e: std::io::Error| DriverError::Internal(format!("nobody serves it: {e}"));
    let (until_unwanted, wanted) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    let (hand_over, begins) = oneshot::channel();
    let (ends, ended) = oneshot::channel::<()>();
    let serve = move || {
        let _until_the_end = (ends, lent);
        let mut hand_over = Some(hand_over);
        let mut tell = |begun| hand_over.take().map(|hand_over| hand_over.send(begun).is_ok());
        // One that nobody takes is closed, and that ends it.
        if let Err(error) = export.serve(&place, &until_unwanted, |client| _ = tell(Ok(client))) {
            tell(Err(error));
        }
    };
    std::thread::Builder::new().name("nbd".to_owned()).spawn(serve).map_err(failed)?;
    let connection = begins.await.map_err(|_| DriverError::Internal("its server was cut off".to_owned()))??;
    let ended = Box::pin(async move {
        let _wanted = wanted;
        let _ = ended.await;
    });
    Ok(Served { connection, ended })
}
