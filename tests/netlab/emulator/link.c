/* The link emulator, and the way into its namespaces.

   link enter USER NET COMMAND...          joins the namespaces of these descriptors (USER -1: none), then runs COMMAND
   link run USER NET CONTROL MTU UP DOWN   joins them, then moves frames between the interfaces UP and DOWN (where
                                           frames of that way arrive) until the other end of CONTROL is closed */
#define _GNU_SOURCE
#include "control.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* Under load, look at time and arrivals only this often, unless a shorter delay was asked for: a timer and the sleep
   until it cost as much as five packets. */
enum { GATHER_NS = 200000 };

static struct path path;
static struct control control;

static void join(const char *descriptor)
{
    int fd = atoi(descriptor);
    if (fd < 0)
        return;
    if (setns(fd, 0))
        err(126, "setns");
    close(fd);
}

static struct timespec until(int64_t at, int64_t now)
{
    int64_t wait = at > now ? at - now : 0;
    return (struct timespec){wait / 1000000000, wait % 1000000000};
}

static void move_frames(void)
{
    struct pollfd polled[] = {
        {.fd = control.fd, .events = POLLIN},
        {.fd = path.port[UP].fd, .events = POLLIN},
        {.fd = path.port[DOWN].fd, .events = POLLIN},
    };
    for (;;) {
        bool gather = path_run(&path) && path_least_delay(&path) > 4 * GATHER_NS;
        int64_t next = path_next(&path), now = now_ns();
        if (gather)
            next = now + GATHER_NS;
        struct timespec wait = until(next, now);
        polled[0].events = control.out_length ? POLLIN | POLLOUT : POLLIN;
        int ready = ppoll(polled, gather ? 1 : 3, next == INT64_MAX ? NULL : &wait, NULL);
        if (ready < 0 && errno != EINTR)
            err(1, "ppoll");
        if (ready > 0 && polled[0].revents & POLLOUT)
            control_flush(&control);
        if (ready > 0 && polled[0].revents & ~POLLOUT && !control_read(&control, &path))
            return;
    }
}

/* Real time where permitted, else as nice as permitted, with the session's group of tasks (sched(7), autogroup). */
static void be_punctual(void)
{
    prctl(PR_SET_TIMERSLACK, 1);
    if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}) == 0)
        return;
    setpriority(PRIO_PROCESS, 0, -10);
    int group = open("/proc/self/autogroup", O_WRONLY | O_CLOEXEC);
    if (group >= 0) {
        (void)!write(group, "-10", 3);
        close(group);
    }
}

int main(int count, char **words)
{
    if (count < 5)
        errx(2, "usage: link enter USER NET COMMAND... | link run USER NET CONTROL MTU UP DOWN");
    join(words[2]);
    join(words[3]);
    if (!strcmp(words[1], "enter")) {
        execvp(words[4], words + 4);
        err(errno == ENOENT ? 127 : 126, "%s", words[4]);
    }
    if (count != 8)
        errx(2, "link run takes six arguments");
    prctl(PR_SET_NAME, "netlab-link");
    be_punctual();
    signal(SIGINT, SIG_IGN);
    control.fd = atoi(words[4]);
    for (int way = UP; way <= DOWN; way++)
        port_open(&path.port[way], words[6 + way], (size_t)atoi(words[5]));
    move_frames();
    return 0;
}
