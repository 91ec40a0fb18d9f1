//! The daemon's interfaces. They are what `data/org.layeredstores1.*.xml` say, to which the daemon's own are held as well.

use std::collections::HashMap;

use serde::Serialize;
use zbus::{
    proxy,
    wire::{DeserializeDict, OwnedObjectPath, Type},
};

/// The daemon as a whole.
#[proxy(
    interface = "org.layeredstores1.Manager",
    default_service = "org.layeredstores1",
    default_path = "/org/layeredstores1"
)]
pub trait Manager {
    /// All stores: name, state and object.
    fn list_stores(&self) -> zbus::Result<Vec<(String, String, OwnedObjectPath)>>;

    /// What is left of stores that are not declared any more: name, directory, and whether it takes memory.
    fn list_left_over(&self) -> zbus::Result<Vec<(String, String, bool)>>;

    /// Removes all that is in a store that is down, or what is left of one.
    #[zbus(allow_interactive_auth)]
    fn remove_data(&self, name: &str) -> zbus::Result<()>;

    /// Reads the configuration again.
    #[zbus(allow_interactive_auth)]
    fn reload(&self) -> zbus::Result<()>;

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;
}

/// One store.
#[proxy(interface = "org.layeredstores1.Store", default_service = "org.layeredstores1")]
pub trait Store {
    /// Brings it up.
    #[zbus(allow_interactive_auth)]
    fn start(&self) -> zbus::Result<()>;

    /// Takes it down.
    #[zbus(allow_interactive_auth)]
    fn stop(&self) -> zbus::Result<()>;

    /// Makes its merged directory agree with its layers.
    #[zbus(allow_interactive_auth)]
    fn remount(&self) -> zbus::Result<()>;

    /// Begins a look at every path, which changes nothing. The job's result is what is stale: name and reason.
    #[zbus(allow_interactive_auth)]
    fn verify(&self) -> zbus::Result<OwnedObjectPath>;
}

/// Something long that is done about a store.
#[proxy(interface = "org.layeredstores1.Job", default_service = "org.layeredstores1")]
pub trait Job {
    /// Waits for it no more, and ends it if nobody else does.
    fn cancel(&self) -> zbus::Result<()>;

    /// Returns when it is over, with what it has found.
    fn get_result(&self) -> zbus::Result<Vec<(String, String)>>;

    /// It is over: how, and why if it has not succeeded.
    #[zbus(signal)]
    fn finished(&self, result: String, error: String) -> zbus::Result<()>;

    /// What it does.
    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> zbus::Result<String>;

    /// The store that it is about.
    #[zbus(property(emits_changed_signal = "const"))]
    fn store(&self) -> zbus::Result<String>;

    /// `waiting`, `running`, `succeeded`, `failed` or `cancelled`.
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;

    /// How much is done.
    #[zbus(property)]
    fn done(&self) -> zbus::Result<u64>;

    /// How much there is to do; 0 until that is known.
    #[zbus(property)]
    fn total(&self) -> zbus::Result<u64>;
}

/// The properties of a store. As JSON, the names in kebab-case.
#[derive(Clone, Debug, DeserializeDict, Serialize, Type)]
#[zbus(signature = "a{sv}", rename_all = "PascalCase")]
#[serde(rename_all = "kebab-case")]
pub struct Properties {
    /// Its name.
    pub name: String,
    /// `inactive`, `activating`, `active`, `deactivating` or `failed`.
    pub state: String,
    /// Why it is in this state, or nothing.
    pub state_reason: String,
    /// Since when, in microseconds since 1970.
    #[zbus(rename = "StateChangeUSec")]
    pub state_change_usec: u64,
    /// When it is tried again, or 0.
    #[zbus(rename = "NextTryUSec")]
    pub next_try_usec: u64,
    /// What is wrong: code and message.
    #[serde(serialize_with = "problems")]
    pub problems: Vec<(String, String)>,
    /// The URL for Nix.
    pub store_uri: String,
    /// That of its Nix daemon, or nothing.
    pub daemon_uri: String,
    /// The lower store as declared.
    pub lower_store: String,
    /// The lower store's directory.
    pub lower_store_dir: String,
    /// What the store adds.
    pub upper_layer: String,
    /// OverlayFS's scratch directory.
    pub work_dir: String,
    /// Where both are merged.
    pub real_store_dir: String,
    /// Nix's database.
    pub state_dir: String,
    /// The systemd unit of the mount.
    pub mount_unit: String,
    /// Whether it is declared, or on its way out.
    pub declared: bool,
    /// Whether the daemon is ready only once it is active.
    pub required: bool,
    /// When it was refreshed last, in microseconds since 1970, or 0.
    #[zbus(rename = "LastRefreshUSec")]
    pub last_refresh_usec: u64,
    /// How.
    pub last_refresh: String,
    /// How often, since the daemon was started.
    pub refresh_count: u64,
    /// How often by a new superblock.
    pub swap_count: u64,
    /// Whether what follows is known.
    pub contents_known: bool,
    /// Valid paths whose files are in the upper layer.
    pub upper_path_count: u64,
    /// Their size as NARs, in bytes.
    pub upper_nar_size: u64,
    /// Those of them whose files are in the lower store as well.
    pub shadowed_path_count: u64,
    /// Their size as NARs, in bytes.
    pub shadowed_nar_size: u64,
    /// Valid paths whose files are in the lower store only.
    pub lower_path_count: u64,
    /// Valid paths whose files are nowhere.
    pub lost_path_count: u64,
    /// Paths that are kept in the lower store.
    pub lease_count: u64,
}

/// The properties of a job, as far as they are asked for of all.
#[derive(Clone, Debug, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "PascalCase")]
pub struct JobProperties {
    /// What it does.
    pub kind: String,
    /// The store that it is about.
    pub store: String,
    /// `waiting`, `running`, `succeeded`, `failed` or `cancelled`.
    pub state: String,
}

impl Properties {
    /// Whether it is up, or down because it is to be.
    pub fn is_at_rest(&self) -> bool {
        matches!(self.state.as_str(), "active" | "inactive")
    }
}

/// Objects read better in JSON than pairs.
fn problems<S: serde::Serializer>(problems: &[(String, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(problems.iter().map(|(code, message)| HashMap::from([("code", code), ("message", message)])))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use zbus::{
        Message,
        wire::{Type, Variant},
    };

    use super::*;

    const MANAGER: &str = include_str!("../../../data/org.layeredstores1.Manager.xml");
    const STORE: &str = include_str!("../../../data/org.layeredstores1.Store.xml");
    const JOB: &str = include_str!("../../../data/org.layeredstores1.Job.xml");

    /// The values of some attributes of all elements of a kind, as `make lint` has seen that it is XML.
    fn elements<'x, const N: usize>(xml: &'x str, kind: &str, attributes: [&str; N]) -> Vec<[&'x str; N]> {
        let begin = format!("<{kind} ");
        let value = |element: &'x str, attribute: &str| {
            let (_, rest) = element.split_once(&format!("{attribute}=\"")).expect("it has the attribute");
            rest.split_once('"').expect("it ends").0
        };
        let elements = xml.split(&begin).skip(1).map(|rest| rest.split_once('>').expect("it ends").0);
        elements.map(|element| attributes.map(|attribute| value(element, attribute))).collect()
    }

    #[test]
    fn the_properties_are_those_of_the_introspection_and_no_others() {
        let published = elements(STORE, "property", ["name", "type"]);
        let value = |signature| match signature {
            "s" => Variant::from(""),
            "t" => Variant::from(0_u64),
            "b" => Variant::from(false),
            "a(ss)" => Variant::from(Vec::<(String, String)>::new()),
            other => panic!("a property of another type: {other}"),
        };
        let all: HashMap<_, _> = published.iter().map(|&[name, signature]| (name, value(signature))).collect();
        let decode = |all: &HashMap<&str, Variant<'_>>| {
            let message = Message::signal("/x", "x.x", "X").build(all).expect("a message");
            message.body().deserialize::<Properties>()
        };
        let properties = decode(&all).expect("all are there");
        let json = serde_json::to_value(properties).expect("text");
        // `LastRefreshUSec` is `last-refresh-usec`.
        let plain = |name: &str| name.replace('-', "").to_lowercase();
        let here: BTreeSet<_> = json.as_object().expect("an object").keys().map(|key| plain(key)).collect();
        let there: BTreeSet<_> = published.iter().map(|[name, _]| plain(name)).collect();
        assert_eq!(here, there);
        for [name, _] in published {
            let mut fewer = all.clone();
            fewer.remove(name);
            assert!(decode(&fewer).is_err(), "{name} is not read");
        }
    }

    #[test]
    fn the_methods_are_there_and_answer_with_what_is_expected() {
        let answers = |xml: &str, method: &str| -> String {
            let (_, rest) = xml.split_once(&format!("<method name=\"{method}\">")).expect("there is the method");
            let (arguments, _) = rest.split_once("</method>").expect("it ends");
            let all = elements(arguments, "arg", ["type", "direction"]);
            all.into_iter().filter(|[_, direction]| *direction == "out").map(|[signature, _]| signature).collect()
        };
        let stores = <Vec<(String, String, OwnedObjectPath)>>::SIGNATURE.to_string();
        let left_over = <Vec<(String, String, bool)>>::SIGNATURE.to_string();
        let stale = <Vec<(String, String)>>::SIGNATURE.to_string();
        for (xml, method, answer) in [
            (MANAGER, "ListStores", stores.as_str()),
            (MANAGER, "ListLeftOver", &left_over),
            (MANAGER, "RemoveData", ""),
            (MANAGER, "Reload", ""),
            (STORE, "Start", ""),
            (STORE, "Stop", ""),
            (STORE, "Remount", ""),
            (STORE, "Verify", "o"),
            (JOB, "Cancel", ""),
            (JOB, "GetResult", &stale),
        ] {
            assert_eq!(answers(xml, method), answer, "{method}");
        }
    }
}
