//! Back ends that an argument says as a list, in the words that the monitor takes for the same.

use serde_json::{Map, Value, json};

/// `chardev-add`'s arguments for what `-chardev` would say so; `None` for a kind that we do not make.
pub fn chardev(list: &str) -> Option<Value> {
    let list = Words::of(list);
    let text = |key: &str| list.get(key).map(Value::from);
    let flag = |key: &str| list.get(key).map(|word| Value::from(word == "on"));
    let number = |key: &str| list.get(key).and_then(|word| word.parse::<i64>().ok()).map(Value::from);
    let mut data = Map::new();
    let mut say = |key: &str, value: Option<Value>| _ = value.map(|value| data.insert(key.to_owned(), value));
    match list.kind.as_str() {
        "null" | "pty" => {}
        "file" => {
            say("out", text("path"));
            say("append", flag("append"));
        }
        "serial" | "parallel" | "pipe" => say("device", text("path")),
        "socket" => {
            let unix = list.get("path").map(|path| json!({ "type": "unix", "data": { "path": path } }));
            say("addr", Some(unix.unwrap_or_else(|| inet(&list, "host", "port"))));
            say("server", Some(Value::from(list.get("server") == Some("on"))));
            say("wait", flag("wait"));
            say("telnet", flag("telnet"));
            say("tls-creds", text("tls-creds"));
            say("reconnect", number("reconnect"));
        }
        "udp" => {
            say("remote", Some(inet(&list, "host", "port")));
            let local = list.get("localaddr").or(list.get("localport"));
            say("local", local.map(|_| inet(&list, "localaddr", "localport")));
        }
        "spicevmc" => say("type", text("name")),
        "spiceport" => say("fqdn", text("name")),
        "dbus" => say("name", text("name")),
        "qemu-vdagent" => {
            say("clipboard", flag("clipboard"));
            say("mouse", flag("mouse"));
        }
        _ => return None,
    }
    say("logfile", text("logfile"));
    say("logappend", flag("logappend"));
    Some(json!({ "id": list.get("id"), "backend": { "type": list.kind, "data": data } }))
}

fn inet(list: &Words, host: &str, port: &str) -> Value {
    let (host, port) = (list.get(host).unwrap_or_default(), list.get(port).unwrap_or_default());
    json!({ "type": "inet", "data": { "host": host, "port": port } })
}

/// `netdev_add`'s arguments for what `-netdev` would say so. `given` is the name under which the monitor was given the
/// descriptor of that number.
pub fn netdev(list: &str, given: impl Fn(i32) -> String) -> Value {
    let list = Words::of(list);
    let mut said = Map::new();
    said.insert("type".to_owned(), Value::from(list.kind.as_str()));
    for (key, word) in &list.pairs {
        let value = match key.as_str() {
            "vhost" | "server" => Value::from(word == "on"),
            "queues" | "sndbuf" => word.parse::<u64>().map_or_else(|_| Value::from(word.as_str()), Value::from),
            "fd" | "fds" | "vhostfd" | "vhostfds" => {
                let names = word.split(':').map(|number| number.parse().map_or_else(|_| number.to_owned(), &given));
                Value::from(names.collect::<Vec<_>>().join(":"))
            }
            "ipv6-net" => {
                let (prefix, length) = word.split_once('/').unwrap_or((word, "64"));
                said.insert("ipv6-prefix".to_owned(), Value::from(prefix));
                said.insert("ipv6-prefixlen".to_owned(), Value::from(length.parse::<u64>().unwrap_or(64)));
                continue;
            }
            "addr.type" => {
                said.insert("addr".to_owned(), json!({ "type": word }));
                continue;
            }
            "addr.str" => {
                said["addr"]["str"] = Value::from(word.parse().map_or_else(|_| word.clone(), &given));
                continue;
            }
            _ => Value::from(word.as_str()),
        };
        said.insert(key.clone(), value);
    }
    Value::Object(said)
}

/// A list as it was said.
struct Words {
    kind: String,
    pairs: Vec<(String, String)>,
}

impl Words {
    /// `kind,key=value,…`, commas in values doubled.
    fn of(list: &str) -> Words {
        // No argument has a byte 0 in it.
        let apart = list.replace(",,", "\0");
        let mut words = apart.split(',').map(|word| word.replace('\0', ","));
        let kind = words.next().unwrap_or_default();
        let pair = |word: String| word.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        Words { kind, pairs: words.filter_map(pair).collect() }
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn character_devices_are_said_to_the_monitor() {
        let said = |list: &str| chardev(list).expect("known");
        let log = said("pty,id=charserial1,logfile=/a,,b,logappend=on");
        let data = json!({ "logfile": "/a,b", "logappend": true });
        assert_eq!(log, json!({ "id": "charserial1", "backend": { "type": "pty", "data": data } }));
        let socket = said("socket,id=c,path=/run/x,server=on,wait=off");
        let addr = json!({ "type": "unix", "data": { "path": "/run/x" } });
        let data = json!({ "addr": addr, "server": true, "wait": false });
        assert_eq!(socket["backend"], json!({ "type": "socket", "data": data }));
        let tcp = said("socket,id=c,host=::1,port=7,reconnect=3");
        let addr = json!({ "type": "inet", "data": { "host": "::1", "port": "7" } });
        let data = json!({ "addr": addr, "server": false, "reconnect": 3 });
        assert_eq!(tcp["backend"]["data"], data);
        assert_eq!(said("file,id=c,path=/f,append=off")["backend"]["data"], json!({ "out": "/f", "append": false }));
        assert_eq!(chardev("ringbuf,id=c"), None);
    }

    #[test]
    fn network_back_ends_are_said_to_the_monitor() {
        let name = |fd: i32| format!("given{fd}");
        let said = netdev("tap,fds=20:21,id=hostnet1,vhost=on,vhostfds=22:23,sndbuf=4096", name);
        let all = json!({ "type": "tap", "fds": "given20:given21", "id": "hostnet1", "vhost": true,
            "vhostfds": "given22:given23", "sndbuf": 4096 });
        assert_eq!(said, all);
        let said = netdev("stream,id=hostnet2,server=off,addr.type=fd,addr.str=150", name);
        let addr = json!({ "type": "fd", "str": "given150" });
        assert_eq!(said, json!({ "type": "stream", "id": "hostnet2", "server": false, "addr": addr }));
        let said = netdev("user,id=hostnet0,net=10.1.0.0/16,ipv6-net=fd00::/64", name);
        let all = json!({ "type": "user", "id": "hostnet0", "net": "10.1.0.0/16", "ipv6-prefix": "fd00::",
            "ipv6-prefixlen": 64 });
        assert_eq!(said, all);
    }
}
