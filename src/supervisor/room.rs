//! What is wrong with an upper layer that does not take writes.

use layered_stores_model::StoreSpec;
use layered_stores_overlay::room::Room;

use super::status::Problem;

/// What is wrong, and the way out. `point` is where the filesystem of the upper layer is mounted.
pub(super) fn describe(spec: &StoreSpec, room: Room, point: &str) -> Option<(Problem, String)> {
    let upper = &spec.layers.upper;
    let make_room = || match &spec.ephemeral {
        Some(ephemeral) => format!(
            "collect garbage in the store, or raise ephemeral-size (now \"{}\") and run `layered-stores reload`",
            ephemeral.size
        ),
        None => format!("collect garbage in the store, delete something else below {point}, or make it larger"),
    };
    match room {
        Room::Enough => None,
        Room::ReadOnly(errno) => Some((
            Problem::ReadOnly,
            format!(
                "the filesystem of its upper layer {upper} takes no writes: {errno}; `journalctl -k` may say why. Run `mount -o \
                 remount,rw {point}`; if it had an error, stop the store, unmount it, check it with fsck and mount it again"
            ),
        )),
        Room::NoSpace(of) => Some((
            Problem::Full,
            format!(
                "the filesystem of its upper layer {upper} is full: less than 1 of {} MiB is free for others than root; {}",
                of >> 20,
                make_room()
            ),
        )),
        Room::NoFiles(errno) => Some((
            Problem::Full,
            format!(
                "the filesystem of its upper layer {upper} is full: no file can be made there, though it has space: {errno}; {}",
                make_room()
            ),
        )),
    }
}
