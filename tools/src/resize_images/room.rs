//! How much is in work at the same time: threads wait until what they take fits.

use std::sync::{Condvar, Mutex, PoisonError};

/// An amount that is shared by threads.
#[derive(Debug)]
pub(super) struct Room {
    size: u64,
    taken: Mutex<u64>,
    freed: Condvar,
}

/// A part that is taken; given back on drop.
#[derive(Debug)]
pub(super) struct Held<'a> {
    room: &'a Room,
    amount: u64,
}

impl Room {
    pub(super) fn of(size: u64) -> Self {
        Self { size, taken: Mutex::new(0), freed: Condvar::new() }
    }

    /// Waits until `amount` fits. What is larger than all the room waits until it is alone. A thread
    /// that holds a part must not take another.
    pub(super) fn take(&self, amount: u64) -> Held<'_> {
        let amount = amount.min(self.size);
        // The number is right even if a thread that held the lock has panicked.
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self
            .freed
            .wait_while(taken, |taken| *taken + amount > self.size)
            .unwrap_or_else(PoisonError::into_inner);
        *taken += amount;
        Held { room: self, amount }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *self.room.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.amount;
        self.room.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn never_more_than_the_room_and_everyone_gets_in() {
        let room = Room::of(10);
        let (inside, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (room, inside, most) = (&room, &inside, &most);
                scope.spawn(move || {
                    for turn in 0..50 {
                        // 17 is more than there is.
                        let amount = [3, 6, 17][(thread + turn) as usize % 3];
                        let _held = room.take(amount);
                        let counted = amount.min(10);
                        let now = inside.fetch_add(counted, Ordering::SeqCst) + counted;
                        most.fetch_max(now, Ordering::SeqCst);
                        inside.fetch_sub(counted, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 10);
        assert_eq!(*room.taken.lock().unwrap(), 0);
    }
}
