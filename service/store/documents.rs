//! Documents of one kind of object: a folder with `<uuid>.xml`, whose presence makes the object persistent, and beside each
//! `<uuid>.json`, what XML has no word for. Domains, networks, pools and secrets are kept so.

use super::{Draft, change_all, json, read_bytes, read_json, remove, replace_json, uuids};
use crate::error::{Error, Result};
use serde::{Serialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A kind of object whose documents are kept in a folder of their own below the state folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Folder {
    Domains,
    Networks,
    Pools,
    Secrets,
}

impl Folder {
    /// All of them.
    pub const ALL: [Folder; 4] = [Folder::Domains, Folder::Networks, Folder::Pools, Folder::Secrets];

    /// Its name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Folder::Domains => "domains",
            Folder::Networks => "networks",
            Folder::Pools => "pools",
            Folder::Secrets => "secrets",
        }
    }
}

/// The documents of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Documents(pub(super) PathBuf);

/// A document as it was found, with what is noted of it.
#[derive(Debug)]
pub(crate) struct FoundDocument<N> {
    pub uuid: Uuid,
    /// Its text; or why it cannot be read.
    pub text: Result<String, String>,
    pub note: N,
}

/// A document and its note on disk, not in their places. Dropped before that, they are gone.
#[derive(Debug)]
pub(crate) struct DraftedDocument {
    draft: Draft,
    uuid: Uuid,
    text: String,
    note: Vec<u8>,
}

impl Documents {
    /// Stores a document and its note; the note first, so that a document never lacks one.
    pub fn save(&self, uuid: Uuid, text: &str, note: &impl Serialize) -> Result<()> {
        let note = json(note)?;
        let [of_note, of_document] = Self::names(uuid);
        change_all(&self.0, &[(&of_note, &note), (&of_document, text.as_bytes())], &[])
    }

    /// Has a document and its note on disk, to be put in their places by [`Documents::put`].
    pub fn draft(&self, uuid: Uuid, text: String, note: &impl Serialize) -> Result<DraftedDocument> {
        let note = json(note)?;
        let [of_note, of_document] = Self::names(uuid);
        let files: [(&str, &[u8]); 2] = [(&of_note, &note), (&of_document, text.as_bytes())];
        Ok(DraftedDocument { draft: Draft::write(&self.0, &files)?, uuid, text, note })
    }

    /// As [`Documents::save`], of an object of which nothing is stored; with a draft where that is of all this.
    pub fn put(&self, draft: Option<DraftedDocument>, uuid: Uuid, text: &str, note: &impl Serialize) -> Result<()> {
        let as_drafted = json(note)?;
        match draft.filter(|draft| (draft.uuid, &*draft.text, &draft.note) == (uuid, text, &as_drafted)) {
            Some(drafted) => drafted.draft.put(&[]),
            None => self.save(uuid, text, note),
        }
    }

    /// Stores a note.
    pub fn save_note(&self, uuid: Uuid, note: &impl Serialize) -> Result<()> {
        replace_json(&self.note(uuid), note)
    }

    /// Stores something else beside a document: `<uuid>.<what>.json`.
    pub fn save_beside(&self, uuid: Uuid, what: &str, value: &impl Serialize) -> Result<()> {
        replace_json(&self.beside(uuid, what), value)
    }

    /// What is stored beside a document; nothing if nothing was.
    pub fn load_beside<N: DeserializeOwned + Default>(&self, uuid: Uuid, what: &str) -> Result<N> {
        let path = self.beside(uuid, what);
        if path.exists() { read_json(&path) } else { Ok(N::default()) }
    }

    /// Removes what is stored beside a document; nothing need be there.
    pub fn remove_beside(&self, uuid: Uuid, what: &str) -> Result<()> {
        remove(&self.beside(uuid, what))
    }

    fn beside(&self, uuid: Uuid, what: &str) -> PathBuf {
        self.0.join(format!("{uuid}.{what}.json"))
    }

    /// Removes a document, then its note. On failure the document is there still; a note that cannot be removed now means
    /// nothing without it.
    pub fn remove(&self, uuid: Uuid) -> Result<()> {
        remove(&self.document(uuid))?;
        remove(&self.note(uuid)).unwrap_or_else(|e| tracing::warn!(%uuid, "{e}"));
        Ok(())
    }

    /// All documents with their notes. One that cannot be read is logged and left alone, and is among them; so is one whose
    /// note is lost, with an empty one.
    pub fn load<N: DeserializeOwned + Default>(&self) -> Result<Vec<FoundDocument<N>>> {
        let found = self.uuids()?.into_iter().map(|uuid| {
            let path = self.document(uuid);
            let text = read_bytes(&path).map_err(|e| Error::from_io("read", &path, &e).to_string());
            let text = text.and_then(|bytes| {
                String::from_utf8(bytes).map_err(|_| format!("{} cannot be read: it is not UTF-8", path.display()))
            });
            if let Err(why) = &text {
                tracing::error!(%uuid, "its document is left alone: {why}");
            }
            FoundDocument { uuid, text, note: self.load_note(uuid) }
        });
        let found = found.collect();
        self.remove_lonely_notes();
        Ok(found)
    }

    /// What is noted of a document; nothing where that is lost.
    pub fn load_note<N: DeserializeOwned + Default>(&self, uuid: Uuid) -> N {
        read_json(&self.note(uuid)).unwrap_or_else(|e| {
            tracing::warn!(%uuid, "{e}; owner and autostart of this object are lost, root owns it now");
            N::default()
        })
    }

    /// Whose documents there are. Where the state folder is read-only, a folder of a newer kind may not be there: it holds none.
    pub fn uuids(&self) -> Result<Vec<Uuid>> {
        match self.0.try_exists() {
            Ok(false) => Ok(Vec::new()),
            _ => uuids(&self.0, "xml"),
        }
    }

    /// A note without a document is what a define or undefine left that was cut off.
    pub fn remove_lonely_notes(&self) {
        let lonely =
            uuids(&self.0, "json").unwrap_or_default().into_iter().filter(|uuid| !self.document(*uuid).exists());
        for uuid in lonely {
            remove(&self.note(uuid)).unwrap_or_else(|e| tracing::warn!(%uuid, "{e}"));
        }
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Where the document of an object is.
    pub fn document(&self, uuid: Uuid) -> PathBuf {
        let [_, of_document] = Self::names(uuid);
        self.0.join(of_document)
    }

    fn note(&self, uuid: Uuid) -> PathBuf {
        let [of_note, _] = Self::names(uuid);
        self.0.join(of_note)
    }

    /// What the files of a note and of its document are called, in the order in which they are written.
    fn names(uuid: Uuid) -> [String; 2] {
        [format!("{uuid}.json"), format!("{uuid}.xml")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[derive(Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Note {
        owner: u32,
    }

    #[test]
    fn what_is_drafted_is_found_when_it_is_put_and_only_as_it_is_to_be() {
        let folder = tempfile::tempdir().expect("a folder");
        let documents = Documents(folder.path().to_owned());
        let [one, other] = [1, 2].map(Uuid::from_u128);
        let draft = |owner| documents.draft(one, "<a/>".to_owned(), &Note { owner }).expect("written");
        let entries = || fs::read_dir(folder.path()).expect("a folder").count();
        drop(draft(7));
        assert_eq!(entries(), 0, "it is gone");
        let drafted = draft(7);
        assert!(documents.uuids().expect("a folder").is_empty());
        documents.put(Some(drafted), one, "<a/>", &Note { owner: 7 }).expect("put");
        documents.put(Some(draft(7)), other, "<b/>", &Note { owner: 8 }).expect("put");
        let found = documents.load::<Note>().expect("a folder");
        let found: Vec<_> =
            found.iter().map(|one| (one.uuid, one.text.as_deref().expect("read"), one.note.owner)).collect();
        assert_eq!(found, [(one, "<a/>", 7), (other, "<b/>", 8)]);
        assert_eq!(entries(), 4, "nothing unfinished is left");
    }

    #[test]
    fn what_is_saved_is_found_and_what_cannot_be_read_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let documents = Documents(folder.path().to_owned());
        let [good, broken, lost] = [1, 2, 3].map(Uuid::from_u128);
        documents.save(good, "<a/>", &Note { owner: 7 }).expect("saved");
        fs::write(documents.document(broken), b"\xff").expect("written");
        documents.save_note(lost, &Note { owner: 8 }).expect("saved");
        let found = documents.load::<Note>().expect("a folder");
        assert_eq!(found.iter().map(|one| one.uuid).collect::<Vec<_>>(), [good, broken]);
        assert_eq!((found[0].text.as_deref(), &found[0].note), (Ok("<a/>"), &Note { owner: 7 }));
        assert!(found[1].text.as_ref().is_err_and(|why| why.contains("not UTF-8")), "{:?}", found[1].text);
        assert_eq!(found[1].note, Note::default());
        assert!(!documents.note(lost).exists(), "a note alone means nothing");
        documents.remove(good).expect("removed");
        assert!(!documents.document(good).exists() && !documents.note(good).exists());
        let none = Documents(folder.path().join("never made"));
        assert_eq!(none.load::<Note>().expect("no folder").len(), 0);
    }
}
