//! Looking whether upper layers take writes.

use layered_stores_model::StoreName;
use layered_stores_overlay::room::Room;
use tokio::time::Instant;

use super::{Engine, done::Done};
use crate::supervisor::{
    entry::Entry, machine::Machine, operation::OperationError, plan::Phase, room, status::Problem,
};

/// When it is to be looked whether a store's upper layer takes writes.
pub(super) fn room_at(entry: &Entry) -> Option<Instant> {
    entry.rooms.due().filter(|_| entry.phase == Phase::Active && entry.stuck.is_none())
}

impl Engine {
    /// Begins the looks whose time has come. They wait for nothing that is being done about a store, and nothing waits for them.
    pub(super) fn look_at_rooms(&mut self, now: Instant) {
        let is_due = |entry: &&mut Entry| room_at(entry).is_some_and(|at| at <= now);
        for entry in self.entries.values_mut().filter(is_due) {
            entry.rooms.begin();
            let begun = self.machine.room(&entry.spec);
            entry.follow(&begun.progress);
            let name = entry.spec.name.clone();
            self.operations.spawn(async move { (name, Done::RoomSeen(begun.result.await)) });
        }
    }

    pub(super) fn has_seen_room(&mut self, name: &StoreName, room: Result<Room, OperationError>) {
        // Down by now, it has nothing to be written to; when it comes up it is looked anew.
        let Some(entry) = self.entries.get_mut(name).filter(|entry| entry.phase == Phase::Active) else { return };
        // That it was not found out is a mistake of the daemon's, which the next look may not make.
        let room = room.unwrap_or(Room::Enough);
        let wrong = describe(&*self.machine, entry, room);
        entry.rooms.seen(wrong, Instant::now());
        entry.look_at_room();
        let owner_seen = entry.owner_seen;
        self.publish(name);
        if !owner_seen {
            self.look_at_owner(name);
        }
    }
}

/// What is wrong, and the way out.
pub(super) fn describe(machine: &dyn Machine, entry: &Entry, seen: Room) -> Option<(Problem, String)> {
    if seen == Room::Enough {
        return None;
    }
    let point = machine.mount_point_of(entry.spec.layers.upper.as_path());
    room::describe(&entry.spec, seen, point.as_deref().unwrap_or("/"))
}
