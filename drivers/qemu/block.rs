//! The block nodes of a running guest, found by what they hold rather than by what they were once called.

use super::instance::Body;
use super::known::Holds;
use super::monitor::Monitor;
use crate::host::image::{Bitmaps, InnerSnapshot};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::driver::DriverError;
use virt_model::driver::checkpoints::BitmapState;

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    /// `qcow2`, `file`, …
    pub driver: String,
    /// The file or device that it is about.
    pub file: PathBuf,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// What it takes on the host's storage, in bytes, where that can be told.
    pub allocated: Option<u64>,
    /// The offset whose first writing is told; 0: none.
    pub write_threshold: u64,
    /// Snapshots in it.
    pub snapshots: Vec<InnerSnapshot>,
    /// Bitmaps that tell what has been written.
    pub bitmaps: Bitmaps,
}

/// How QEMU is asked for all of them.
const ALL: (&str, fn() -> Value) = ("query-named-block-nodes", || json!({ "flat": true }));

/// Which node reads which image, and nothing else: that is asked for once, until it may have changed.
#[derive(Debug, Default)]
pub struct Readers(Nodes);

impl Readers {
    /// Those of a running guest.
    pub async fn of(body: &Body) -> Result<Arc<Readers>, DriverError> {
        body.known((ALL.0, ALL.1()), Holds::UntilNodesChange, |told| Readers(Nodes::told(told))).await
    }

    /// The name of the node that reads an image in its format.
    pub fn image(&self, path: &Path, format: &str) -> Option<&str> {
        self.0.image(path, format).map(|node| &*node.name)
    }

    /// [`Nodes::of_images`].
    pub fn of_images(&self, images: &[PathBuf]) -> Result<Vec<String>, DriverError> {
        self.0.of_images(images)
    }
}

/// All nodes.
#[derive(Clone, Debug, Default)]
pub struct Nodes(pub Vec<Node>);

impl Nodes {
    /// Asks a running guest's QEMU.
    pub async fn of(body: &Body) -> Result<Nodes, DriverError> {
        Nodes::ask(&body.line()?).await
    }

    /// Asks QEMU.
    pub async fn ask(line: &Monitor) -> Result<Nodes, DriverError> {
        Ok(Nodes::told(&line.patiently(ALL.0, ALL.1()).await?))
    }

    /// Those of a running guest as they were when something last changed: names, files and what the guest sees hold, what
    /// they take on the host's storage does not.
    pub async fn known(body: &Body) -> Result<Arc<Nodes>, DriverError> {
        body.known((ALL.0, ALL.1()), Holds::UntilAnyChange, Nodes::told).await
    }

    fn told(told: &Value) -> Nodes {
        let nodes = told.as_array().into_iter().flatten().map(|node| {
            let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
            let inner = node["image"]["snapshots"].clone();
            let bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
            let bitmap = |told: &Value| Some((told["name"].as_str()?.to_owned(), bitmap_state(told)));
            Node {
                name: text("node-name"),
                driver: text("drv"),
                file: file_of(&text("file")),
                virtual_size: node["image"]["virtual-size"].as_u64().unwrap_or_default(),
                allocated: node["image"]["actual-size"].as_u64(),
                write_threshold: node["write_threshold"].as_u64().unwrap_or_default(),
                snapshots: serde_json::from_value(inner).unwrap_or_default(),
                bitmaps: bitmaps.filter_map(bitmap).collect(),
            }
        });
        Nodes(nodes.collect())
    }

    /// The node that reads an image in its format.
    pub fn image(&self, path: &Path, format: &str) -> Option<&Node> {
        // What is on no file of the host is told without one, and is none of those.
        let named = !path.as_os_str().is_empty();
        self.0.iter().find(|node| named && node.driver == format && node.file == path)
    }

    /// The node of what lies in a drive.
    pub fn of_disk(&self, disk: &Disk) -> Result<&Node, DriverError> {
        let (path, format) = (disk.path().unwrap_or_default(), disk.meant_format());
        self.image(Path::new(path), format).ok_or_else(|| {
            let target = &disk.target.dev;
            DriverError::Refused(format!("disk '{target}': the running guest does not have {path} open as {format}"))
        })
    }

    /// The nodes of images that take part in an internal snapshot, the one first that holds the memory.
    pub fn of_images(&self, images: &[PathBuf]) -> Result<Vec<String>, DriverError> {
        let found = images.iter().map(|image| {
            let node = self.image(image, "qcow2").map(|node| node.name.clone());
            node.ok_or_else(|| {
                let image = image.display();
                DriverError::Refused(format!("the running guest does not have {image} open, which holds the snapshot"))
            })
        });
        found.collect()
    }

    /// Refuses what QEMU would take for another snapshot: where it loads one, numbers come before names.
    pub fn unmistakable(&self, name: &str, images: &[PathBuf]) -> Result<(), DriverError> {
        let mut found = images.iter().filter_map(|image| Some((image, self.image(image, "qcow2")?)));
        found.try_for_each(|(image, node)| unmistakable(name, image, &node.snapshots))
    }

    /// A name for new nodes that nothing has yet.
    pub fn free_name(&self, target: &str) -> String {
        let taken = |name: &str| self.0.iter().any(|node| node.name.starts_with(name));
        let name = |number: usize| format!("{target}-o{number}-");
        let number = (1..).find(|number| !taken(&name(*number))).unwrap_or_default();
        format!("{target}-o{number}")
    }
}

/// The node that a filter stands on now.
pub async fn below(body: &Body, filter: &str) -> Result<String, DriverError> {
    let graph = body.execute("x-debug-query-block-graph", json!({})).await?;
    child(&graph, filter)
        .ok_or_else(|| DriverError::Hypervisor(format!("QEMU does not tell on what '{filter}' stands")))
}

fn child(graph: &Value, filter: &str) -> Option<String> {
    let nodes = || graph["nodes"].as_array().into_iter().flatten().filter(|node| node["type"] == "block-driver");
    let number = &nodes().find(|node| node["name"] == filter)?["id"];
    let mut edges = graph["edges"].as_array()?.iter();
    let edge = edges.find(|edge| edge["parent"] == *number && edge["name"] == "file")?;
    nodes().find(|node| node["id"] == edge["child"])?["name"].as_str().map(str::to_owned)
}

/// How a bitmap stands of which QEMU tells that. What is not in the image is lost with the process.
fn bitmap_state(told: &Value) -> BitmapState {
    let is = |key: &str| told[key].as_bool().unwrap_or_default();
    match is("inconsistent") {
        true => BitmapState::Inconsistent,
        false if is("recording") && is("persistent") => BitmapState::Sound,
        false => BitmapState::Idle,
    }
}

/// The same for what one image holds.
pub fn unmistakable(name: &str, image: &Path, inner: &[InnerSnapshot]) -> Result<(), DriverError> {
    match inner.iter().find(|inner| inner.id == name && inner.name != name) {
        None => Ok(()),
        Some(other) => Err(DriverError::Refused(format!(
            "{} holds '{}' under the number {name}, which QEMU would load for the name '{name}'; delete '{}' first",
            image.display(),
            other.name,
            other.name
        ))),
    }
}

/// Deletes a snapshot inside the images of these nodes, from the last on.
/// Those that do not hold it are passed over.
pub async fn delete_snapshot(line: &Monitor, name: &str, mut nodes: Vec<String>) -> Result<(), DriverError> {
    while let Some(node) = nodes.last() {
        // One answer, where a job takes three. It is refused for what is not the top of its chain: jobs know that as well.
        let arguments = json!({ "device": node, "name": name });
        match line.patiently("blockdev-snapshot-delete-internal-sync", arguments).await {
            Ok(_) => nodes.truncate(nodes.len() - 1),
            Err(DriverError::Hypervisor(_)) => {
                // A job refuses nodes that are only read, or whose memory has been sent away, also where they hold nothing.
                let holds = |node: &Node| node.snapshots.iter().any(|inner| inner.name == name);
                let all = Nodes::ask(line).await?;
                nodes.retain(|name| all.0.iter().any(|node| node.name == *name && holds(node)));
                if nodes.is_empty() {
                    return Ok(());
                }
                let arguments = json!({ "tag": name, "devices": nodes });
                return line.job("snapshot-delete", "virtd-snapshot-delete", arguments, None).await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// QEMU tells a file by its name, or by all its options where those were given.
pub fn file_of(text: &str) -> PathBuf {
    let Some(options) = text.strip_prefix("json:").and_then(|json| serde_json::from_str::<Value>(json).ok()) else {
        return PathBuf::from(text);
    };
    let mut at = &options;
    while at["file"].is_object() {
        at = &at["file"];
    }
    PathBuf::from(at["filename"].as_str().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_told_by_name_or_by_options() {
        assert_eq!(file_of("/a/b"), Path::new("/a/b"));
        let options = r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"/a,b"}}"#;
        assert_eq!(file_of(options), Path::new("/a,b"));
    }

    #[test]
    fn what_a_filter_stands_on_is_found_by_the_graph_and_no_image_by_no_name() {
        let node = |id: u64, kind: &str, name: &str| json!({ "id": id, "type": kind, "name": name });
        let edge = |parent: u64, child: u64, name: &str| json!({ "parent": parent, "child": child, "name": name });
        let graph = json!({
            "nodes": [node(1, "block-backend", ""), node(2, "block-driver", "vda-throttle"),
                node(3, "block-driver", "vda-format"), node(4, "block-driver", "vda-storage")],
            "edges": [edge(1, 2, "root"), edge(2, 3, "file"), edge(3, 4, "file")],
        });
        let below = |name: &str| child(&graph, name);
        assert_eq!(below("vda-throttle").as_deref(), Some("vda-format"));
        assert_eq!((below("vda-storage"), below("vdb-throttle"), below("")), (None, None, None));
        let node = Node {
            name: "vdb-format".to_owned(),
            driver: "raw".to_owned(),
            file: PathBuf::new(),
            virtual_size: 0,
            allocated: None,
            write_threshold: 0,
            snapshots: Vec::new(),
            bitmaps: Bitmaps::default(),
        };
        assert!(Nodes(vec![node]).image(Path::new(""), "raw").is_none());
    }

    #[test]
    fn a_name_that_is_the_number_of_another_is_refused() {
        let inner =
            |id: &str, name: &str| InnerSnapshot { id: id.into(), name: name.into(), ..InnerSnapshot::default() };
        let (image, held) = (Path::new("/a"), [inner("1", "2"), inner("2", "1"), inner("3", "3")]);
        let why = unmistakable("1", image, &held).unwrap_err().to_string();
        assert!(why.contains("delete '2' first"), "{why}");
        assert!(unmistakable("3", image, &held).is_ok() && unmistakable("4", image, &held).is_ok());
    }
}
