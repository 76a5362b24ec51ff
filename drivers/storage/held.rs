//! Which folder is which pool's, for as long as the pool has it.

use super::failed;
use super::folder::PoolFolder;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use uuid::Uuid;
use virt_model::driver::DriverError;

/// Which folder is which pool's: by its file system and number there.
#[derive(Clone, Default)]
pub struct Held(Arc<Mutex<HashMap<(u64, u64), Holder>>>);

/// Who holds a folder.
struct Holder {
    pool: Uuid,
    name: String,
    folder: Weak<PoolFolder>,
}

/// A pool's folder. Who unmounts it lets go of it first: a file system with a folder that is open is busy.
#[derive(Clone)]
pub struct HeldFolder {
    held: Held,
    pool: Uuid,
    name: String,
    folder: Arc<Mutex<Option<Arc<PoolFolder>>>>,
}

impl HeldFolder {
    /// Of a folder that was [taken](Held::take).
    pub fn new(held: Held, (pool, name): (Uuid, &str), folder: Arc<PoolFolder>) -> HeldFolder {
        HeldFolder { held, pool, name: name.to_owned(), folder: Arc::new(Mutex::new(Some(folder))) }
    }

    /// The folder. Error: the pool is being stopped.
    pub fn get(&self) -> Result<Arc<PoolFolder>, DriverError> {
        let text = || DriverError::Refused(format!("pool '{}' has just been stopped", self.name));
        self.peek().ok_or_else(text)
    }

    /// The same where that is no error.
    pub fn peek(&self) -> Option<Arc<PoolFolder>> {
        self.folder.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has it no more. Whoever works in it has it until they have done.
    pub fn let_go(&self) {
        *self.folder.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Has it again, found anew. Blocks.
    pub fn take_again(&self, folder: PoolFolder, path: &Path) -> Result<(), DriverError> {
        let folder = Arc::new(folder);
        self.held.take(&folder, self.pool, &self.name, path)?;
        *self.folder.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder);
        Ok(())
    }
}

impl Held {
    /// A pool takes a folder; whether it had not taken it before. Error: it is another pool's, which writes in it and keeps what is
    /// known of its files. Blocks.
    pub fn take(&self, folder: &Arc<PoolFolder>, pool: Uuid, name: &str, path: &Path) -> Result<bool, DriverError> {
        let which = folder.which().map_err(|e| failed("open", path, &e))?;
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, holder| holder.folder.strong_count() > 0);
        if let Some(other) = held.get(&which).filter(|holder| holder.pool != pool) {
            let (path, name) = (path.display(), &other.name);
            return Err(DriverError::Refused(format!(
                "{path}: that folder is pool '{name}' already: stop that one first"
            )));
        }
        let holder = Holder { pool, name: name.to_owned(), folder: Arc::downgrade(folder) };
        Ok(held.insert(which, holder).is_none())
    }
}
