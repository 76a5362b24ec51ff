//! The lowest node of a disk: a file, a device, or a connection to a server; and the secrets that go with it.

use super::Builder;
use super::args::Props;
use crate::qemu::capabilities::End;
use crate::qemu::plan::{Secret, SecretContent};
use serde_json::{Value, json};
use virt_model::device::disk::DiskKind;
use virt_model::device::source::{Auth, Cookies, DiskSource, Encryption, Protocol, SourceHost, Transport};
use virt_model::secret::{SecretName, UsageKind};

/// The first file descriptor given to secrets.
const FIRST_SECRET_FD: i32 = 100;

impl Builder<'_> {
    /// The node of a source; `name` begins the names of what goes with it.
    pub(super) fn storage_node(&mut self, source: &DiskSource, kind: DiskKind, name: &str, removable: bool) -> Props {
        let node = format!("{name}-storage");
        let props = match (kind, source.protocol) {
            (DiskKind::Network, Some(protocol)) => {
                return self.server_node(source, protocol, name).set("node-name", node);
            }
            (DiskKind::Block, _) if removable => Props::new("driver", "host_cdrom"),
            (DiskKind::Block, _) => Props::new("driver", "host_device"),
            _ => Props::new("driver", "file"),
        };
        props.set("filename", source.path(kind).unwrap_or_default()).set("node-name", node)
    }

    fn server_node(&mut self, source: &DiskSource, protocol: Protocol, name: &str) -> Props {
        match protocol {
            Protocol::Nbd if source.tls == Some(true) => {
                let credentials = format!("{name}-tls");
                self.credentials(&credentials, End::Client);
                let props = nbd(source).set("tls-creds", credentials);
                props.maybe("tls-hostname", source.tls_hostname.as_deref())
            }
            Protocol::Nbd => nbd(source),
            Protocol::Rbd => self.rbd(source, name),
            Protocol::Iscsi => self.iscsi(source, name),
            Protocol::Ssh => ssh(source),
            Protocol::Gluster => gluster(source),
            _ => self.by_url(source, protocol, name),
        }
    }

    fn rbd(&mut self, source: &DiskSource, name: &str) -> Props {
        let (pool, image) = source.name.as_deref().unwrap_or_default().split_once('/').unwrap_or_default();
        let props = Props::new("driver", "rbd").set("pool", pool).set("image", image);
        let servers: Vec<Value> = source.hosts.iter().map(|host| inet(host, 6789)).collect();
        let props = props.maybe("server", (!servers.is_empty()).then_some(servers));
        let config = source.config.as_ref().map(|config| config.file.as_str());
        config.iter().for_each(|file| self.read_whole(file));
        let props = props.maybe("conf", config).maybe("snapshot", source.snapshot.as_ref().map(|s| s.name.as_str()));
        let Some(auth) = &source.auth else { return props };
        let key = self.secret_of(auth, Protocol::Rbd, name, Some("base64"));
        let props = props.set("user", &*auth.username).set("auth-client-required", json!(["cephx", "none"]));
        props.maybe("key-secret", key)
    }

    fn iscsi(&mut self, source: &DiskSource, name: &str) -> Props {
        let text = source.name.as_deref().unwrap_or_default();
        let (target, lun) = text.rsplit_once('/').unwrap_or((text, "0"));
        let default = SourceHost::default();
        let host = source.hosts.first().unwrap_or(&default);
        let portal = format!("{}:{}", in_brackets(host.name.as_deref().unwrap_or_default()), host.port.unwrap_or(3260));
        let props = Props::new("driver", "iscsi").set("portal", portal).set("target", target);
        let props = props.set("lun", lun.parse().unwrap_or(0_u32)).set("transport", "tcp");
        let props = props.maybe("initiator-name", source.initiator.as_ref().map(|i| i.iqn.name.as_str()));
        let Some(auth) = &source.auth else { return props };
        let password = self.secret_of(auth, Protocol::Iscsi, name, None);
        props.set("user", &*auth.username).maybe("password-secret", password)
    }

    fn by_url(&mut self, source: &DiskSource, protocol: Protocol, name: &str) -> Props {
        let mut props = Props::new("driver", protocol.as_str()).set("url", url(source, protocol));
        if let Some(auth) = &source.auth {
            let password = self.secret_of(auth, protocol, name, None);
            props = props.set("username", &*auth.username).maybe("password-secret", password);
        }
        if let Some(cookies) = &source.cookies {
            let id = format!("{name}-cookies");
            self.secret(&id, SecretContent::Said(cookie_line(cookies)), None);
            props = props.set("cookie-secret", id);
        }
        props
            .maybe("sslverify", source.ssl.as_ref().and_then(|ssl| ssl.verify))
            .maybe("readahead", source.readahead.as_ref().map(|r| r.size))
            .maybe("timeout", source.timeout.as_ref().map(|t| t.seconds))
    }

    fn secret_of(&mut self, auth: &Auth, protocol: Protocol, name: &str, format: Option<&str>) -> Option<String> {
        let kept = SecretName::of_auth(auth, Some(protocol))?;
        let id = format!("{name}-auth");
        self.secret(&id, SecretContent::Kept(kept), format);
        Some(id)
    }

    /// The id of the object that opens encrypted content.
    pub(super) fn passphrase(&mut self, encryption: &Encryption, name: &str) -> Option<String> {
        let kept = SecretName::of(encryption.secrets.first()?, UsageKind::Volume)?;
        let id = format!("{name}-key");
        self.secret(&id, SecretContent::Kept(kept), None);
        Some(id)
    }

    fn secret(&mut self, id: &str, content: SecretContent, format: Option<&str>) {
        let file = self.handed(content);
        let object = Props::new("qom-type", "secret").set("id", id).set("file", file);
        self.args.object(object.maybe("format", format));
    }

    /// The name of an open file from which QEMU reads what no argument may say.
    pub(super) fn handed(&mut self, content: SecretContent) -> String {
        let fd = self.secrets.len().try_into().map_or(FIRST_SECRET_FD, |n: i32| FIRST_SECRET_FD + n);
        self.secrets.push(Secret { fd, content });
        format!("/dev/fd/{fd}")
    }
}

fn nbd(source: &DiskSource) -> Props {
    let default = SourceHost::default();
    let host = source.hosts.first().unwrap_or(&default);
    let server = match host.transport {
        Some(Transport::Unix) => json!({"type": "unix", "path": host.socket.as_deref().unwrap_or_default()}),
        _ => {
            let mut server = inet(host, 10_809);
            server["type"] = json!("inet");
            server
        }
    };
    let delay = source.reconnect.as_ref().and_then(|reconnect| reconnect.delay);
    let export = source.name.as_deref().filter(|name| !name.is_empty());
    Props::new("driver", "nbd").set("server", server).maybe("export", export).maybe("reconnect-delay", delay)
}

fn ssh(source: &DiskSource) -> Props {
    let default = SourceHost::default();
    let server = inet(source.hosts.first().unwrap_or(&default), 22);
    let props =
        Props::new("driver", "ssh").set("server", server).set("path", source.name.as_deref().unwrap_or_default());
    props.maybe("user", source.identity.as_ref().and_then(|identity| identity.username.as_deref()))
}

fn gluster(source: &DiskSource) -> Props {
    let (volume, path) = source.name.as_deref().unwrap_or_default().split_once('/').unwrap_or_default();
    let server = |host: &SourceHost| match host.transport {
        Some(Transport::Unix) => json!({"type": "unix", "path": host.socket.as_deref().unwrap_or_default()}),
        _ => {
            let mut server = inet(host, 24_007);
            server["type"] = json!("inet");
            server
        }
    };
    let servers: Vec<Value> = source.hosts.iter().map(server).collect();
    Props::new("driver", "gluster").set("volume", volume).set("path", path).set("server", servers)
}

fn inet(host: &SourceHost, port: u16) -> Value {
    json!({"host": host.name.as_deref().unwrap_or_default(), "port": host.port.unwrap_or(port).to_string()})
}

fn url(source: &DiskSource, protocol: Protocol) -> String {
    let default = SourceHost::default();
    let host = source.hosts.first().unwrap_or(&default);
    let port = host.port.map(|port| format!(":{port}")).unwrap_or_default();
    let query = source.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
    let path = source.name.as_deref().unwrap_or_default().trim_start_matches('/');
    format!("{protocol}://{}{port}/{path}{query}", in_brackets(host.name.as_deref().unwrap_or_default()))
}

/// An IPv6 address before a port.
fn in_brackets(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn cookie_line(cookies: &Cookies) -> String {
    let pair =
        |c: &virt_model::device::source::Cookie| format!("{}={}", c.name, c.value.as_deref().unwrap_or_default());
    cookies.cookies.iter().map(pair).collect::<Vec<_>>().join("; ")
}
