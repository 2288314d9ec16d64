#define _GNU_SOURCE
#include "control.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>

struct field {
    const char *name;
    size_t offset;
};

static const struct field wire_fields[] = {
    {"delay", offsetof(struct wire, delay)},
    {"reorder_delay", offsetof(struct wire, reorder_delay)},
    {"loss", offsetof(struct wire, loss)},
    {"reorder", offsetof(struct wire, reorder)},
    {"duplicate", offsetof(struct wire, duplicate)},
    {"corrupt", offsetof(struct wire, corrupt)},
    {"rate", offsetof(struct wire, rate)},
    {"queue", offsetof(struct wire, queue)},
    {NULL, 0},
};

static const struct field limit_fields[] = {
    {"rate", offsetof(struct limits, rate)},   {"police", offsetof(struct limits, police)},
    {"queue", offsetof(struct limits, queue)}, {"burst", offsetof(struct limits, burst)},
    {"delay", offsetof(struct limits, delay)}, {"loss", offsetof(struct limits, loss)},
    {NULL, 0},
};

static const char *const causes[CAUSES] = {
    "lost", "queue", "connection_queue", "policed", "blackholed", "reset", "oversize",
};

__attribute__((format(printf, 2, 3))) static void say(struct control *control, const char *format, ...)
{
    if (control->out_space - control->out_length < 1024) {
        control->out_space = control->out_space * 2 + 4096;
        control->out = realloc(control->out, control->out_space);
        if (!control->out)
            abort();
    }
    va_list arguments;
    va_start(arguments, format);
    control->out_length += (size_t)vsnprintf(control->out + control->out_length, 1024, format, arguments);
    va_end(arguments);
}

static bool assign(void *structure, const struct field *fields, char **rest)
{
    for (char *word; (word = strtok_r(NULL, " ", rest));) {
        char *equals = strchr(word, '=');
        const struct field *field = fields;
        if (!equals)
            return false;
        *equals = 0;
        while (field->name && strcmp(field->name, word))
            field++;
        if (!field->name)
            return false;
        double value = strtod(equals + 1, NULL);
        memcpy((char *)structure + field->offset, &value, sizeof value);
    }
    return true;
}

static bool number(char **rest, uint64_t end, uint64_t *value)
{
    char *word = strtok_r(NULL, " ", rest), *after;
    if (!word)
        return false;
    *value = strtoull(word, &after, 10);
    return !*after && *value < end;
}

static bool set_limit(struct path *path, char **rest)
{
    char *kind = strtok_r(NULL, " ", rest);
    uint64_t index, way;
    if (!kind)
        return false;
    bool rule = !strcmp(kind, "rule");
    if (!number(rest, rule ? path->flows.rule_count : path->flows.count, &index) || !number(rest, 2, &way))
        return false;
    if (rule)
        return assign(&path->flows.rules[index].limits[way], limit_fields, rest);
    return assign(&path->flows.all[index]->passage[way].limits, limit_fields, rest);
}

enum fault { BLACKHOLE, RESTORE, RESET_BOTH, FAULTS };

static const char *const faults[FAULTS] = {"blackhole", "restore", "reset"};

static void inflict(struct path *path, struct flow *flow, enum fault fault, uint64_t ways)
{
    if (fault == BLACKHOLE)
        flow->blackholed |= (uint8_t)ways;
    else if (fault == RESTORE)
        flow->blackholed &= (uint8_t)~ways;
    else
        path_reset(path, flow);
}

/* Returns how many connections it concerned, -1: not understood. For "all", later ones too, but for resets. */
static int64_t fault(struct path *path, enum fault fault, char **rest)
{
    char *which = strtok_r(NULL, " ", rest);
    uint64_t value = 0, ways = 3;
    int64_t found = 0;
    bool all = which && !strcmp(which, "all"), port = which && !strcmp(which, "port");
    if (!which || (!all && !number(rest, port ? 65536 : path->flows.count, &value)))
        return -1;
    if (fault != RESET_BOTH && !number(rest, 4, &ways))
        return -1;
    if (all && fault == BLACKHOLE) {
        path->blackholed |= (uint8_t)ways;
        return path->flows.count;
    }
    if (all && fault == RESTORE)
        path->blackholed &= (uint8_t)~ways;
    for (uint32_t i = 0; i < path->flows.count; i++) {
        struct flow *flow = path->flows.all[i];
        bool meant = all || (port ? flow->key.port[UP] == value || flow->key.port[DOWN] == value : i == value);
        if (!meant || (fault != RESTORE && flow->closed) || (fault == RESET_BOTH && flow->key.protocol != IPPROTO_TCP))
            continue;
        inflict(path, flow, fault, ways);
        found++;
    }
    return found;
}

static void list(struct control *control, const struct path *path, bool all)
{
    const char *comma = "";
    say(control, "{\"connections\": [");
    for (uint32_t i = 0; i < path->flows.count; i++) {
        const struct flow *flow = path->flows.all[i];
        const struct passage *up = &flow->passage[UP], *down = &flow->passage[DOWN];
        char address[2][INET6_ADDRSTRLEN];
        if (flow->closed && !all)
            continue;
        for (int way = UP; way <= DOWN; way++)
            inet_ntop(flow->key.family == 4 ? AF_INET : AF_INET6, flow->key.address[way], address[way], sizeof *address);
        say(control, "%s{\"index\": %u, \"protocol\": \"%s\", \"client\": [\"%s\", %u], \"server\": [\"%s\", %u], ", comma,
            flow->index, flow->key.protocol == IPPROTO_TCP ? "tcp" : "udp", address[UP], flow->key.port[UP],
            address[DOWN], flow->key.port[DOWN]);
        say(control, "\"packets\": [%lu, %lu], \"bytes\": [%lu, %lu], \"dropped\": [%lu, %lu], ", up->packets,
            down->packets, up->bytes, down->bytes, up->dropped, down->dropped);
        say(control, "\"blackholed\": %s, \"closed\": %s}", flow->blackholed ? "true" : "false",
            flow->closed ? "true" : "false");
        comma = ", ";
    }
    say(control, "]}\n");
}

static double percentile_ms(const struct lateness *lateness, double part)
{
    uint64_t wanted = (uint64_t)((double)lateness->count * part), seen = 0;
    int step = 0;
    while (step < LATENESS_STEPS - 1 && (seen += lateness->steps[step]) <= wanted)
        step++;
    double value = (step + 1) * (LATENESS_STEP_NS / 1e6), max = (double)lateness->max / 1e6;
    return lateness->count == 0 ? 0 : value > max || step == LATENESS_STEPS - 1 ? max : value;
}

static void report(struct control *control, struct path *path)
{
    const struct lateness *lateness = &path->lateness;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    say(control, "{\"ways\": [");
    for (int way = UP; way <= DOWN; way++) {
        const struct counters *counters = &path->counters[way];
        port_count_overrun(&path->port[way]);
        say(control, "%s{\"packets_in\": %lu, \"bytes_in\": %lu, \"packets_out\": %lu, \"bytes_out\": %lu, ", way ? ", " : "",
            counters->packets_in, counters->bytes_in, counters->packets_out, counters->bytes_out);
        say(control, "\"reordered\": %lu, \"duplicated\": %lu, \"corrupted\": %lu, \"refused\": %lu, \"overrun\": %lu, ",
            counters->reordered, counters->duplicated, counters->corrupted, counters->refused, path->port[way].overrun);
        for (int cause = 0; cause < CAUSES; cause++)
            say(control, "%s\"%s\": %lu", cause ? ", " : "\"dropped\": {", causes[cause], counters->dropped[cause]);
        say(control, "}}");
    }
    say(control, "], \"late_p50_ms\": %.3f, \"late_p99_ms\": %.3f, \"late_max_ms\": %.3f, ", percentile_ms(lateness, 0.5),
        percentile_ms(lateness, 0.99), (double)lateness->max / 1e6);
    uint64_t over = lateness->count;
    for (int step = 0; step < 2000000 / LATENESS_STEP_NS; step++)
        over -= lateness->steps[step];
    say(control, "\"late_over_2_ms\": %lu, \"connections\": %u, \"waiting\": %zu, \"cpu_s\": %.3f}\n", over,
        path->flows.count, path->waiting,
        (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
            (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
}

static void clear(struct path *path)
{
    memset(path->counters, 0, sizeof path->counters);
    memset(&path->lateness, 0, sizeof path->lateness);
    for (int way = UP; way <= DOWN; way++)
        port_count_overrun(&path->port[way]), path->port[way].overrun = 0;
}

static void obey(struct control *control, struct path *path, char *line)
{
    char *rest, *verb = strtok_r(line, " ", &rest);
    uint64_t value;
    bool understood = true;
    int64_t found = 0;
    int kind = 0;
    while (verb && kind < FAULTS && strcmp(verb, faults[kind]))
        kind++;
    if (!verb) {
        understood = false;
    } else if (kind < FAULTS) {
        found = fault(path, (enum fault)kind, &rest);
        understood = found >= 0;
    } else if (!strcmp(verb, "seed")) {
        understood = number(&rest, UINT64_MAX, &path->seed);
    } else if (!strcmp(verb, "link")) {
        understood = number(&rest, 2, &value) && assign(&path->wire[value], wire_fields, &rest);
    } else if (!strcmp(verb, "rule")) {
        understood = number(&rest, 65536, &value) && flow_add_rule(&path->flows, (uint16_t)value);
    } else if (!strcmp(verb, "limit")) {
        understood = set_limit(path, &rest);
    } else if (!strcmp(verb, "list")) {
        list(control, path, !strcmp(rest, "all"));
        return;
    } else if (!strcmp(verb, "report")) {
        report(control, path);
        return;
    } else if (!strcmp(verb, "clear")) {
        clear(path);
    } else {
        understood = false;
    }
    if (understood)
        say(control, "{\"connections\": %ld}\n", found);
    else
        say(control, "{\"error\": \"not understood: %.100s\"}\n", verb ? verb : "");
}

void control_flush(struct control *control)
{
    while (control->out_start < control->out_length) {
        ssize_t sent = send(control->fd, control->out + control->out_start, control->out_length - control->out_start,
                            MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent <= 0)
            return;
        control->out_start += (size_t)sent;
    }
    control->out_start = control->out_length = 0;
}

bool control_read(struct control *control, struct path *path)
{
    ssize_t got = recv(control->fd, control->in + control->in_length, sizeof control->in - control->in_length, MSG_DONTWAIT);
    if (got <= 0)
        return got < 0 && (errno == EAGAIN || errno == EINTR);
    control->in_length += (size_t)got;
    char *line = control->in, *end;
    while ((end = memchr(line, '\n', control->in_length - (size_t)(line - control->in)))) {
        *end = 0;
        obey(control, path, line);
        line = end + 1;
    }
    control->in_length -= (size_t)(line - control->in);
    memmove(control->in, line, control->in_length);
    control_flush(control);
    return true;
}
