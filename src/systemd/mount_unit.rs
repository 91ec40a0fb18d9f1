//! The transient mount unit of a store.

use std::path::Path;

use zbus::wire::Variant;

use super::manager::Properties;
use crate::{
    overlay::options::mount_options,
    store::{MountUnitName, StoreSpec},
};

/// Where systemd keeps the files of transient units.
const TRANSIENT_UNITS: &str = "/run/systemd/transient";

/// The properties `StartTransientUnit` is given for a store.
pub(super) fn properties(spec: &StoreSpec) -> Properties<'static> {
    let layers = &spec.layers;
    // The upper layer is no mount point, and the work dir is on the same mount. Where the mount point's own parents lead
    // there as well, nothing more is needed; each path costs PID 1 a dependency for every directory on the way.
    let upper = layers.upper.as_path().parent().filter(|parent| !layers.merged.as_path().starts_with(parent));
    let requires = [Some(layers.lower.as_path()), upper];
    let requires: Vec<String> = requires.into_iter().flatten().map(|path| path.display().to_string()).collect();
    vec![
        ("Description", Variant::from(format!("Layered Nix store {}", spec.name))),
        ("What", Variant::from("overlay")),
        ("Where", Variant::from(layers.merged.to_string())),
        ("Type", Variant::from("overlay")),
        ("Options", Variant::from(mount_options(layers))),
        // Only the mount point's own parents are in here by default. For a store on a store this is what orders the two.
        ("RequiresMountsFor", Variant::from(requires)),
        // At shutdown the daemon is stopped first, so that it does not see its mounts go and want them back.
        ("Before", Variant::from(vec!["layered-storesd.service"])),
        // mount(8) of util-linux 2.39 and newer fails to remount an overlay through the new mount API. With the old
        // one, a stray `systemctl reload` of this unit does what one would expect.
        ("Environment", Variant::from(vec!["LIBMOUNT_FORCE_MOUNT2=always"])),
    ]
}

/// Whether a mount unit was made by `StartTransientUnit`, and not by a person's unit file, fstab or mount(8).
///
/// systemd keeps a file for each as long as the unit is loaded. Looking for it costs a fraction of a call over the bus.
pub fn is_transient(unit: &MountUnitName) -> bool {
    Path::new(TRANSIENT_UNITS).join(unit.as_str()).exists()
}
