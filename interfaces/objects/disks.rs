//! What is done to the disks of `org.virt.Domain` while it runs, beyond plugging them in and out.

use super::job::{finish, finish_or_ready, no_wait};
use crate::bus::call::{self, Call, Options, Outcome};
use crate::error::Error;
use std::sync::Arc;
use virt_service::{BlockJobOptions, Domain, ResizeOptions};

/// `BlockResize`
pub async fn resize(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, size, mut options): (String, u64, Options) = call.read()?;
    let resize =
        ResizeOptions { shrink: options.flag("shrink")?, cancel_on_disconnect: options.flag("cancel-on-disconnect")? };
    let no_wait = no_wait(options)?;
    let ticket = domain.block_resize(call.caller(), &target, size, resize).await?;
    call.reply(&finish(ticket, no_wait).await?)
}

/// `SetBlockThreshold`
pub async fn set_threshold(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, threshold, options): (String, u64, Options) = call.read()?;
    options.end()?;
    domain.set_block_threshold(call.caller(), &target, threshold).await?;
    call.done()
}

/// `BlockPull`
pub async fn pull(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, base, options): (String, String, Options) = call.read()?;
    let (options, no_wait) = job_options(options, |_, _| Ok(()))?;
    let ticket = domain.block_pull(call.caller(), &target, &base, options).await?;
    call.reply(&finish_or_ready(ticket, no_wait).await?)
}

/// `BlockCommit`
pub async fn commit(domain: Arc<Domain>, call: Call) -> Outcome {
    let (target, base, top, options): (String, String, String, Options) = call.read()?;
    let (options, no_wait) = job_options(options, |told, options| {
        options.delete = told.flag("delete")?;
        Ok(())
    })?;
    let ticket = domain.block_commit(call.caller(), &target, &base, &top, options).await?;
    call.reply(&finish_or_ready(ticket, no_wait).await?)
}

/// `BlockCopy`
pub async fn copy(domain: Arc<Domain>, call: Call) -> Outcome {
    let body = call.body();
    let (target, xml, options): (&str, &str, Options) = call::read(&body)?;
    let (options, no_wait) = job_options(options, |told, options| {
        options.reuse_external = told.flag("reuse-external")?;
        Ok(())
    })?;
    let ticket = domain.block_copy(call.caller(), target, xml, options).await?;
    call.reply(&finish_or_ready(ticket, no_wait).await?)
}

/// The options of a block job, `own` of which are its own alone; and whether not to wait.
fn job_options(
    mut told: Options,
    own: impl FnOnce(&mut Options, &mut BlockJobOptions) -> Result<(), Error>,
) -> Result<(BlockJobOptions, bool), Error> {
    let mut options = BlockJobOptions {
        bandwidth: told.long("bandwidth")?.unwrap_or_default(),
        cancel_on_disconnect: told.flag("cancel-on-disconnect")?,
        ..BlockJobOptions::default()
    };
    own(&mut told, &mut options)?;
    Ok((options, no_wait(told)?))
}
