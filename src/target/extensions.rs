//! The Extensions command: what an initiator wants for itself.

use super::{Action, Arrival, Target};
use crate::sys::buffer::Body;
use crate::wire::extensions::{Strings, Wish};
use crate::wire::{HEADER, Request, frame_max, pad};

impl Target {
    /// Carries out what is known of a request, and answers with its own frame,
    /// where that stands in upper case.
    pub(super) fn extend(
        &mut self,
        arrival: &Arrival,
        request: &Request,
        strings: Strings,
        head: &mut [u8],
    ) -> Action {
        let Arrival { now, nic, info } = *arrival;
        let end = request.frame.len().min(frame_max(info.mtu));
        let mut body = request.frame[HEADER..end].to_vec();
        let asker = request.origin.source;
        // Looked up once: to look for room among all that are remembered, for
        // each of a thousand strings, would make everyone wait.
        let has_room = self.sessions.has_room(now, nic, asker);
        for (place, wish) in strings.iter() {
            let granted = wish.is_some_and(|wish| {
                (has_room || wish == Wish::Reset) && self.sessions.grant(now, nic, asker, wish)
            });
            let text = body.get_mut(place.start - HEADER..place.end - HEADER);
            if let (true, Some(text)) = (granted, text) {
                text.make_ascii_uppercase();
            }
        }
        self.header(head, &info, &request.origin, None);
        match head.get_mut(HEADER..end) {
            Some(room) => {
                room.copy_from_slice(&body);
                Action::plain(pad(head, end))
            }
            None => Action::Reply {
                len: HEADER,
                body: Some(Body::Bytes(body)),
                sum: None,
            },
        }
    }
}
