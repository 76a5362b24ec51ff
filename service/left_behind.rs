//! What machines of which nothing else is left have left of work on their disks: transient ones that ended while virtd was away, with a
//! backup or a block job under way. By its record it is finished, or its files are taken away.

use crate::error::{Error, Result};
use crate::images::Fate;
use crate::shared::{AGAIN, Shared};
use crate::store::{Backup, BlockRecord, on_disk};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::oneshot;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::block_jobs::{BlockJob, BlockStage, BlockWork};
use virt_model::driver::snapshots::Machine;
use virt_model::driver::{Driver, DriverError};

/// Sees to all of it, however often that has to be tried; nothing else is begun with the machine's uuid before. `looked` is dropped
/// after the first time.
pub(crate) fn settle(shared: &Arc<Shared>, uuid: Uuid, looked: Option<oneshot::Sender<()>>) {
    shared.is_unsettled(uuid, true);
    let (shared, mut looked, mut pause) = (shared.clone(), looked, AGAIN.0);
    tokio::spawn(async move {
        while let Err(error) = settle_now(&shared, uuid).await {
            tracing::error!(%uuid, %error, "what it has left of work on its disks is looked at again");
            looked.take();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
        }
        shared.is_unsettled(uuid, false);
        drop(looked);
    });
}

async fn settle_now(shared: &Arc<Shared>, uuid: Uuid) -> Result<()> {
    let on = shared.clone();
    let (mut jobs, backup) = on_disk(move || Ok((on.store.block_jobs(uuid)?, on.store.backup(uuid)?))).await?;
    while let Some((target, record)) = jobs.pop_first() {
        let story = settle_job(shared, uuid, &record).await?;
        let (on, left) = (shared.clone(), jobs.clone());
        on_disk(move || on.store.save_block_jobs(uuid, &left)).await?;
        tracing::warn!(%uuid, target, "the {} was cut off with its machine: {story}", record.job.operation());
    }
    if let Some(backup) = backup {
        let complete = backup.complete;
        settle_backup(shared, uuid, backup).await?;
        let story = if complete { "it is complete" } else { "nothing is left of it" };
        tracing::warn!(%uuid, "a backup was cut off with its machine: {story}");
    }
    Ok(())
}

async fn settle_job(shared: &Arc<Shared>, uuid: Uuid, record: &BlockRecord) -> Result<&'static str> {
    let driver = driver_of(shared, &record.driver)?;
    let works = driver.block_jobs().ok_or_else(|| unserved(&record.driver))?;
    let (machine, job, mut stage) = (machine(uuid, &**driver), &record.job, record.stage);
    let done = match works.settle_block_job(&machine, job, stage.same).await {
        Ok(done) => done,
        Err(error) => {
            // Whoever removed images by hand has decided about them; else the uuid would never be free.
            let Some(file) = missing(driver, &machine, job).await else { return Err(failed(error)) };
            tracing::warn!(%uuid, "{} is not there: {error}; the images are left as they are", file.display());
            false
        }
    };
    let mut remove = if done { record.removes.clone() } else { Vec::new() };
    let copy = match &job.work {
        BlockWork::Copy { to, .. } => Some(to.path.clone()),
        _ => None,
    };
    let used = users_of(shared, remove.iter().map(|layer| layer.path.clone()).chain(copy.clone()).collect()).await;
    remove.retain(|layer| !used.contains_key(&layer.path));
    if copy.is_some_and(|copy| used.contains_key(&copy)) {
        stage = BlockStage { making: false, made: false, ..stage };
    }
    works.clean_up_block_job(&machine, job, done, stage, remove).await.map_err(failed)?;
    Ok(if done { "its disk stands on what it was to stand on" } else { "its disk is as before" })
}

/// An image of a block job that is not there.
async fn missing(driver: &Arc<dyn Driver>, machine: &Machine, job: &BlockJob) -> Option<PathBuf> {
    let files: Vec<PathBuf> = job.chain.iter().map(|layer| layer.path.clone()).collect();
    let judged = driver.storage(&machine.def, &files).await.ok()?;
    files.into_iter().zip(judged).find_map(|(file, found)| matches!(found, Ok(None)).then_some(file))
}

async fn settle_backup(shared: &Arc<Shared>, uuid: Uuid, backup: Backup) -> Result<()> {
    let Backup { mut request, complete, begun, checkpoint, driver, .. } = backup;
    let driver = driver_of(shared, &driver)?;
    let backs_up = driver.backups().ok_or_else(|| unserved(driver.name()))?;
    let used = users_of(shared, request.disks.iter().map(|disk| disk.file.clone()).collect()).await;
    request.disks.retain(|disk| !used.contains_key(&disk.file));
    backs_up.end_backup(&machine(uuid, &**driver), &request, complete).await.map_err(failed)?;
    let on = shared.clone();
    on_disk(move || {
        if let Some(def) = checkpoint.filter(|_| !begun) {
            on.store.remove_checkpoint(uuid, &def.name)?;
        }
        on.store.remove_backup(uuid)
    })
    .await
}

/// What other machines have come to stand on meanwhile stays, and is in the log.
async fn users_of(shared: &Arc<Shared>, files: Vec<PathBuf>) -> BTreeMap<PathBuf, Vec<String>> {
    let used = shared.images.users_of(&files, Fate::Removed, None).await;
    for (file, users) in &used {
        tracing::warn!("{} is not removed: {} stands on it", file.display(), users.join(", "));
    }
    used
}

/// A machine of which no more is known than whose it was.
pub(crate) fn machine(uuid: Uuid, driver: &dyn Driver) -> Machine {
    let kind = driver.types().first().copied().unwrap_or_default().to_owned();
    let def = Arc::new(DomainDef { kind, name: uuid.to_string(), uuid, ..DomainDef::default() });
    Machine { def, guest: None, running: false, folder: PathBuf::new() }
}

/// Whose its machine was. Older records do not say it: then there was but one.
fn driver_of<'a>(shared: &'a Shared, name: &str) -> Result<&'a Arc<dyn Driver>> {
    let only = shared.drivers.first().filter(|_| name.is_empty());
    shared.driver_named(name).or(only).ok_or_else(|| unserved(name))
}

fn unserved(driver: &str) -> Error {
    Error::ConfigUnsupported(format!("this virtd has no driver '{driver}' that could"))
}

fn failed(error: DriverError) -> Error {
    Error::StorageFailed(error.to_string())
}
