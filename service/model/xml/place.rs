//! Where something stands: line, column, and the path to it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where something stands in the document it was read from. Never part of a comparison: two definitions that say the
/// same are equal wherever they say it.
#[derive(Clone, Default)]
pub struct Place {
    /// From 1; 0 for what no document said.
    pub line: u32,
    /// From 1, in characters; 0 as for `line`.
    pub column: u32,
    /// Where in the tree.
    pub path: Path,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {}", self.line, self.column, self.path)
    }
}

impl PartialEq for Place {
    fn eq(&self, _: &Place) -> bool {
        true
    }
}

impl Eq for Place {}

impl Place {
    /// Whether a document said it.
    pub fn is_known(&self) -> bool {
        self.line > 0
    }

    /// This element's attribute; its line and column are the element's.
    pub fn attribute(&self, name: &str) -> Place {
        Place { path: self.path.attribute(name), ..*self }
    }

    /// A child that is missing, or whose own place is not known.
    pub fn child(&self, name: &str) -> Place {
        Place { path: self.path.child(name, 1), ..*self }
    }

    /// A place in no document, with the path such a thing would have: for what was made up and not read.
    pub fn at_path(steps: &[&str]) -> Place {
        let path = steps.iter().fold(Path::default(), |path, step| path.child(step, 1));
        Place { path, ..Place::default() }
    }
}

/// The way from the root element, e.g. `/devices/disk[2]/target/@dev`; `/` for the root itself. Steps are shared, so
/// that a deep tree costs no more than its elements.
#[derive(Clone, Default)]
pub struct Path(Option<Arc<Step>>);

struct Step {
    parent: Path,
    name: String,
    index: u32,
    /// Whether siblings have the same name, so that the number has to be said.
    several: AtomicBool,
}

impl Path {
    /// The `index`-th child of that name, from 1.
    pub fn child(&self, name: &str, index: u32) -> Path {
        let several = AtomicBool::new(index > 1);
        Path(Some(Arc::new(Step { parent: self.clone(), name: name.to_owned(), index, several })))
    }

    /// An attribute.
    pub fn attribute(&self, name: &str) -> Path {
        self.child(&format!("@{name}"), 1)
    }

    /// There are siblings of the same name.
    pub(super) fn is_one_of_several(&self) {
        if let Some(step) = &self.0 {
            step.several.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it leads to an attribute.
    pub fn is_attribute(&self) -> bool {
        self.0.as_ref().is_some_and(|step| step.name.starts_with('@'))
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut steps: Vec<&Step> = Vec::new();
        let mut path = self;
        while let Some(step) = &path.0 {
            steps.push(step);
            path = &step.parent;
        }
        if steps.is_empty() {
            return f.write_str("/");
        }
        for step in steps.into_iter().rev() {
            write!(f, "/{}", step.name)?;
            if step.several.load(Ordering::Relaxed) {
                write!(f, "[{}]", step.index)?;
            }
        }
        Ok(())
    }
}
