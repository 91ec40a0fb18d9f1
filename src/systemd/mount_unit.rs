//! The unit file of a store's mount.
//!
//! The daemon makes the mount itself; systemd sees it in the mount table and loads the unit's file, with what it says of
//! dependencies, from a directory it looks for units in (systemd.unit(5)). There it lasts as long as the mount can: until the
//! next boot.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use layered_stores_model::{MountUnitName, StoreSpec};
use layered_stores_overlay::options::mount_options;
use rustix::fs::{AtFlags, Mode, OFlags};

/// Where unit files go that last until the next boot.
pub(super) const RUNTIME_UNITS: &str = "/run/systemd/system";

/// Where systemd keeps the files of transient units, which is what older daemons have made.
const TRANSIENT_UNITS: &str = "/run/systemd/transient";

/// The first line of every unit file of ours, by which it is told from a person's.
const MARKER: &str = "# Written by layered-storesd for as long as the store is mounted. Changes will be lost.\n";

/// How `Description=` begins. Of what systemd tells of many units at a time, this is what shows whose file it has loaded.
pub(super) const DESCRIPTION: &str = "Layered Nix store ";

/// The text of a store's unit file.
///
/// Nothing is escaped: paths and names hold no character that means something in a unit file
/// ([`AbsolutePath`](layered_stores_model::AbsolutePath)).
fn render(spec: &StoreSpec) -> String {
    let layers = &spec.layers;
    // The upper layer is no mount point, and the work dir is on the same mount. Where the mount point's own parents lead
    // there as well, nothing more is needed; each path costs PID 1 a dependency for every directory on the way.
    let upper = layers.upper.as_path().parent().filter(|parent| !layers.merged.as_path().starts_with(parent));
    let requires = [Some(layers.lower.as_path()), upper];
    let requires: Vec<String> = requires.into_iter().flatten().map(|path| path.display().to_string()).collect();
    let (name, requires) = (&spec.name, requires.join(" "));
    let (merged, options) = (&layers.merged, mount_options(layers));
    // Only the mount point's own parents are in RequiresMountsFor= by default. For a store on a store this is what orders
    // the two.
    //
    // Before=: at shutdown the daemon is stopped first, so that it does not see its mounts go and want them back.
    //
    // mount(8) of util-linux 2.39 and newer fails to remount an overlay through the new mount API. With the old one, a stray
    // `systemctl reload` of this unit does what one would expect.
    format!(
        "{MARKER}\
         [Unit]\n\
         Description={DESCRIPTION}{name}\n\
         RequiresMountsFor={requires}\n\
         Before=layered-storesd.service\n\
         \n\
         [Mount]\n\
         What=overlay\n\
         Where={merged}\n\
         Type=overlay\n\
         Options={options}\n\
         Environment=LIBMOUNT_FORCE_MOUNT2=always\n"
    )
}

/// The file of a unit of this name that is not ours, if there is one.
///
/// `unit_path` is where systemd looks for units. Ours would take the place of some, such as those made from fstab.
pub(super) fn foreign_file(unit: &MountUnitName, unit_path: &[PathBuf]) -> Option<PathBuf> {
    let runtime = Path::new(RUNTIME_UNITS);
    let others = unit_path.iter().map(PathBuf::as_path).filter(|dir| *dir != runtime && *dir != TRANSIENT_UNITS);
    // A symbolic link to /dev/null masks a unit.
    let exists = |file: &PathBuf| file.symlink_metadata().is_ok();
    let is_foreign = |file: &PathBuf| exists(file) && !is_marked(file);
    let runtime = Some(runtime.join(unit.as_str())).filter(is_foreign);
    runtime.or_else(|| others.map(|dir| dir.join(unit.as_str())).find(exists))
}

/// Writes a store's unit file; a file of ours that is there is replaced.
///
/// # Errors
/// `AlreadyExists` when there is a file of somebody else; else what the kernel says.
pub fn write(spec: &StoreSpec) -> io::Result<()> {
    let text = render(spec);
    let path = file_of(&spec.mount_unit);
    if fs::read(&path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    remove(&spec.mount_unit);
    // It appears with all that is in it, or not at all, and never in the place of another.
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(RUNTIME_UNITS, flags, Mode::from_raw_mode(0o644))?);
    file.write_all(text.as_bytes())?;
    rustix::fs::linkat(&file, "", rustix::fs::CWD, &path, AtFlags::EMPTY_PATH)?;
    // systemd looks for new files when the directory's time is another than before (`unit_file_build_name_map`). On kernels
    // older than 6.13 changes within one tick of the clock have one time; the exact time differs from any other.
    File::open(RUNTIME_UNITS)?.set_modified(SystemTime::now())
}

/// Removes a store's unit file, if it is ours.
pub fn remove(unit: &MountUnitName) {
    let path = file_of(unit);
    if is_marked(&path) {
        // One that stays says no more than how to make the mount.
        let _ = fs::remove_file(path);
    }
}

/// Whether a mount unit is ours, and not a person's, of fstab, or of a mount made by hand.
///
/// systemd keeps the file of a transient unit as long as the unit is loaded.
pub fn is_ours(unit: &MountUnitName) -> bool {
    is_marked(&file_of(unit)) || Path::new(TRANSIENT_UNITS).join(unit.as_str()).exists()
}

fn file_of(unit: &MountUnitName) -> PathBuf {
    Path::new(RUNTIME_UNITS).join(unit.as_str())
}

fn is_marked(path: &Path) -> bool {
    fs::read(path).is_ok_and(|text| text.starts_with(MARKER.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use layered_stores_model::fixture;

    fn spec(lower: &str) -> StoreSpec {
        fixture::spec("a-b", lower)
    }

    #[test]
    fn the_unit_file_says_what_the_mount_is_and_what_it_depends_on() {
        let text = render(&spec("/lower/nix/store"));
        assert_eq!(
            text,
            "# Written by layered-storesd for as long as the store is mounted. Changes will be lost.\n\
             [Unit]\n\
             Description=Layered Nix store a-b\n\
             RequiresMountsFor=/lower/nix/store\n\
             Before=layered-storesd.service\n\
             \n\
             [Mount]\n\
             What=overlay\n\
             Where=/srv/a-b/root/nix/store\n\
             Type=overlay\n\
             Options=nosuid,nodev,lowerdir=/lower/nix/store,upperdir=/srv/a-b/upper,workdir=/srv/a-b/work,\
             index=off,metacopy=off,nfs_export=off,redirect_dir=off,xino=off\n\
             Environment=LIBMOUNT_FORCE_MOUNT2=always\n"
        );
    }

    #[test]
    fn an_upper_layer_that_is_not_beside_the_mount_point_is_depended_on_as_well() {
        let mut spec = spec("/lower/nix/store");
        spec.layers.upper = "/data/upper".parse().expect("valid");
        assert!(render(&spec).contains("\nRequiresMountsFor=/lower/nix/store /data\n"));
    }

    #[test]
    fn a_file_along_the_unit_path_is_somebody_elses_even_if_it_only_masks_the_unit() {
        let dir = tempfile::tempdir().expect("a directory");
        let unit = &spec("/lower/nix/store").mount_unit;
        let unit_path = [dir.path().join("absent"), dir.path().to_owned()];
        assert_eq!(foreign_file(unit, &unit_path), None);
        let file = dir.path().join(unit.as_str());
        std::os::unix::fs::symlink("/dev/null", &file).expect("a link");
        assert_eq!(foreign_file(unit, &unit_path), Some(file));
    }
}
