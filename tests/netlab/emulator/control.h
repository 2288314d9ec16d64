/* Commands on a stream socket, one a line, each answered by one line of JSON: {"error": "..."} or what was asked.

   seed N                                  before anything arrives
   link WAY KEY=VALUE...                   keys of struct wire
   rule PORT                               adds a rule; its number is its place
   limit rule|flow NUMBER WAY KEY=VALUE... keys of struct limits
   blackhole|restore WHICH WAYS            WHICH: all, flow NUMBER, port NUMBER; WAYS: bit mask
   reset WHICH                             -> {"connections": how many}
   list live|all                           -> connections
   report | clear                          -> counters and lateness; clear: zero them

   WAY is 0 (up) or 1 (down). Values are in the units of the structures. */
#ifndef CONTROL_H
#define CONTROL_H

#include "path.h"

struct control {
    int fd;
    char in[4096];
    size_t in_length;
    char *out;
    size_t out_start, out_length, out_space;
};

/* Does what was asked. Returns false when the other side has gone. */
bool control_read(struct control *control, struct path *path);

/* Writes what the socket takes; the rest waits. */
void control_flush(struct control *control);

#endif
