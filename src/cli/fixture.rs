//! What the daemon says of a store, for tests.

use layered_stores_client::Properties;

/// A store with which all is well.
pub(super) fn store(name: &str) -> Properties {
    Properties {
        name: name.to_owned(),
        state: "active".to_owned(),
        state_reason: String::new(),
        state_change_usec: 0,
        next_try_usec: 0,
        problems: Vec::new(),
        store_uri: String::new(),
        daemon_uri: String::new(),
        lower_store: "daemon".to_owned(),
        lower_store_dir: "/nix/store".to_owned(),
        upper_layer: String::new(),
        work_dir: String::new(),
        real_store_dir: format!("/s/{name}/root/nix/store"),
        state_dir: String::new(),
        mount_unit: String::new(),
        declared: true,
        required: true,
        last_refresh_usec: 0,
        last_refresh: String::new(),
        refresh_count: 0,
        swap_count: 0,
        contents_known: false,
        upper_path_count: 0,
        upper_nar_size: 0,
        shadowed_path_count: 0,
        shadowed_nar_size: 0,
        lower_path_count: 0,
        lost_path_count: 0,
        lease_count: 0,
    }
}
