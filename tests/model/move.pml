/* The move of one server between two nodes, with its directory row, two senders, two moves and one
 * crash of a node at any step. No clocks. Messages between nodes are lost and repeated.
 *
 * Two questions, one text:
 *
 *   safety     every time-out may fire at any moment, which covers every length of it; any message
 *              may be lost. Nothing wrong may ever be seen.
 *   PROGRESS   there are at most FAULTS lost messages, lost replies, answers of the directory that
 *              are lost or late, and time-outs that fire too early, wherever they hurt, and the
 *              crash. Otherwise a time-out fires when nothing else can happen any more. Then every
 *              run must end (there is no cycle), and end well (no node or sender is left waiting).
 *
 * README.md beside this file says which code each step stands for.
 *
 *   -DNO_SWAP     the swap writes without comparing             (must fail)
 *   -DDROP_EARLY  the frozen copy is dropped at the commit      (must fail)
 *   -DNO_HOLD     a live copy releases before it may            (must fail)
 *   -DNO_RECORDS  a repeat is executed again                    (must fail)
 *   -DGUESS       an answer of the directory that was lost is taken for "not done" (must fail)
 *   -DANY_ROW     the target goes live by whatever the watch shows (must fail)
 *
 * and with -DPROGRESS:
 *
 *   -DNO_ROW      the target never reads the row                (must not end well)
 *   -DNO_RECLAIM  the source never takes the server back        (must not end well)
 *   -DNO_TIMEOUT  the source waits for the target for ever      (must not end well)
 *   -DNO_REPEAT   a sender without an answer asks no more       (must not end well)
 *   -DNO_LOOKUP   a sender never looks up where the server went (must not end well)
 *   -DNO_BURIAL   a server whose node died is not marked lost   (must not end well)
 *   -DRESTLESS    a live copy is asked again without an end     (must have a cycle)
 */
#ifndef REQUESTS
#define REQUESTS 2          /* of each sender, one after the other */
#endif
#ifndef MOVES
#define MOVES 2
#endif
#ifndef FAULTS
#define FAULTS 2
#endif
#define SENDERS 2
#define NOBODY 2

#ifdef PROGRESS
byte faults = FAULTS;
bit watches;                            /* whether targets hear of changes of the row: they may not */
#define MAY (faults > 0)                /* something goes wrong, */
#define HURT faults--                   /* which is counted */
/* A step that time brings: when nothing else can happen any more, or too early, which is a fault. */
#define IN_TIME(when, step) \
  :: atomic { (when) && timeout -> step } \
  :: atomic { (when) && faults > 0 -> faults--; step }
/* What waits for an answer is said again, once; then it is given up. */
#define AGAIN(when, step) \
  :: atomic { (when) && timeout && !move[me].tried && alive[other] -> move[me].tried = 1; step }
#define GIVE_UP(when, step) \
  :: atomic { (when) && timeout && (move[me].tried || !alive[other]) -> step } \
  :: atomic { (when) && faults > 0 -> faults--; step }
/* What a repeat would not change waits. */
#define TAKES(n) (copy[n].phase == SERVING || (copy[n].phase == LIVE && copy[n].done[s] == acked[s]))
#else
#define watches true
#define TAKES(n) (copy[n].phase == SERVING || copy[n].phase == LIVE)
#define MAY true
#define HURT skip
#define IN_TIME(when, step) :: atomic { (when) -> step }
#define AGAIN(when, step) :: atomic { (when) && alive[other] -> step }
#define GIVE_UP(when, step) :: atomic { (when) -> step }
#endif

#ifdef GUESS
#define IN_DOUBT(n) false
#else
#define IN_DOUBT(n) move[n].doubt
#endif

/* phases of a copy at a node */
#define NONE 0
#define SERVING 1
#define FROZEN 2            /* source: from the capture to the end of the move */
#define READY 3             /* target: whole, serves nothing */
#define LIVE 4              /* target: executes, releases nothing */

/* the row */
byte epoch = 1; byte owner = 0; bit sure = 1;      /* sure: ACTIVE; else COMMITTED */
byte previous = NOBODY; byte nonce = 0; bit lost = 0;
bit seen = 1;               /* for the checks alone: the owner of this epoch has released */

/* the copies: what was executed for each sender is the state that must not be lost */
typedef Copy { byte phase; byte epoch; byte id; byte done[SENDERS] };   /* id: the move it came by */
Copy copy[2];
bit alive[2] = { 1, 1 };
byte moves = 0;

/* source side of the move that a node leads */
#define IDLE 0
#define SHIPPING 1
#define COMMITTING 2
#define COMMITTED 3
#define RECLAIMING 4
#define RELEASING 5
typedef Move { byte phase; byte base; byte id; bit doubt; bit tried };  /* base: the epoch it compares */
Move move[2];

mtype = { FINAL, REFUSE, PREPARED, ACTIVATE, ACTIVATED, DENIED, DROPPED, ABORT };
chan to0 = [2] of { mtype, byte, byte, byte, byte };    /* kind, id, epoch, done0, done1 */
chan to1 = [2] of { mtype, byte, byte, byte, byte };

byte at[SENDERS];           /* where a sender believes the server to be */
byte acked[SENDERS];        /* what it was told is done */

inline tell(to, what, xfer, xepoch, x0, x1) {
  if
  :: to == 0 && nfull(to0) -> to0!what,xfer,xepoch,x0,x1
  :: to == 1 && nfull(to1) -> to1!what,xfer,xepoch,x0,x1
  :: to == 0 && full(to0) -> skip      /* lost; whatever matters is repeated */
  :: to == 1 && full(to1) -> skip
  :: MAY -> HURT                       /* lost on the way */
  fi
}

/* Who holds everything that was acknowledged: checked whenever something is acknowledged, and at
 * every change of the row. Excused only once the server is lost, or whoever had it alone is dead. */
#define HAS(n) (copy[n].done[0] >= acked[0] && copy[n].done[1] >= acked[1])
#define CAN(n) (alive[n] && copy[n].phase != NONE && HAS(n))
#define KEPT (lost || !alive[owner] || CAN(owner) || \
              (!sure && (CAN(previous) || (!seen && !alive[previous]))))
/* At most one copy releases. */
#define ONE (!(alive[0] && alive[1] && copy[0].phase == SERVING && copy[1].phase == SERVING))

/* Everybody was served, or the server is lost; no move is under way; no copy stands still. */
#define SERVED (lost || (acked[0] == REQUESTS && acked[1] == REQUESTS))
#define STILL(n) (!alive[n] || (move[n].phase == IDLE && (copy[n].phase == NONE || copy[n].phase == SERVING)))
#define OVER (SERVED && STILL(0) && STILL(1) && (lost || moves == MOVES))

inline forget(n) {
  copy[n].phase = NONE; copy[n].epoch = 0; copy[n].id = 0; copy[n].done[0] = 0; copy[n].done[1] = 0
}

inline idle(n) { move[n].phase = IDLE; move[n].base = 0; move[n].id = 0; move[n].doubt = 0; move[n].tried = 0 }

inline enter(n, where) { move[n].phase = where; move[n].tried = 0 }

inline swap_commit(me, other, won) {
  atomic {
    if
#ifdef NO_SWAP
    :: true ->
#else
    :: !lost && epoch == move[me].base && owner == me ->
#endif
         epoch = move[me].base + 1; owner = other; sure = 0; seen = 0; previous = me;
         nonce = move[me].id; won = 1
    :: !lost && epoch == move[me].base + 1 && nonce == move[me].id && owner == other -> won = 1 + sure
#ifndef NO_SWAP
    :: else -> won = 0
#endif
    fi
  }
}

inline swap_reclaim(me, other, won) {
  atomic {
    if
#ifdef NO_SWAP
    :: true ->
#else
    :: !lost && epoch == move[me].base + 1 && owner == other && !sure && nonce == move[me].id ->
#endif
         epoch = epoch + 1; owner = me; sure = 1; previous = NOBODY; won = 1
    :: !lost && owner == me && epoch == move[me].base + 2 -> won = 1
#ifndef NO_SWAP
    :: else -> won = 0
#endif
    fi
  }
}

inline serve(me) {                  /* the server is here, and released */
  copy[me].phase = SERVING; copy[me].epoch = epoch; copy[me].id = 0; seen = 1;
  assert(ONE)
}

#define COMMITTED_HERE(me) (owner == me && !sure && !lost && nonce == copy[me].id)
#ifdef ANY_ROW
#define SEEN(me) true
#else
#define SEEN(me) COMMITTED_HERE(me)
#endif

inline live(me) {                   /* executes, and says so */
  copy[me].phase = LIVE;
  tell(other, ACTIVATED, copy[me].id, 0, 0, 0)
}

inline roll_back(me) {
  tell(other, ABORT, move[me].id, 0, 0, 0);
  idle(me); serve(me)
}

proctype Node(byte me) {
  byte other = 1 - me, id, e, d0, d1; byte won; mtype kind;
#ifndef PROGRESS
end:
#endif
  do
  :: atomic { !alive[me] -> break }
#ifdef PROGRESS
  :: atomic { alive[me] && OVER -> break }
#endif

  /* ---- leads a move: PREPARING .. SHIPPING */
  :: atomic { alive[me] && move[me].phase == IDLE && copy[me].phase == SERVING && moves < MOVES ->
       moves++; enter(me, SHIPPING); move[me].base = epoch; move[me].id = moves;
       copy[me].phase = FROZEN;
       tell(other, FINAL, moves, epoch, copy[me].done[0], copy[me].done[1]) }
#ifndef NO_TIMEOUT
  AGAIN(alive[me] && move[me].phase == SHIPPING,
        tell(other, FINAL, move[me].id, move[me].base, copy[me].done[0], copy[me].done[1]))
  GIVE_UP(alive[me] && move[me].phase == SHIPPING, roll_back(me))
#endif

  /* ---- commit; the answer of the directory may come after the swap took effect or be repeated */
  :: atomic { alive[me] && move[me].phase == COMMITTING ->
       swap_commit(me, other, won);
       assert(KEPT);
       if
       :: won && MAY -> HURT; move[me].doubt = 1         /* took effect; not known */
       :: won == 1 -> enter(me, COMMITTED);
#ifdef DROP_EARLY
                 forget(me);
#endif
                 tell(other, ACTIVATE, move[me].id, move[me].base + 1, 0, 0)
       :: won == 2 -> enter(me, RELEASING); forget(me);  /* took effect, and was confirmed */
                 tell(other, DROPPED, move[me].id, 0, 0, 0)
       :: !won -> idle(me); forget(me)                   /* fenced */
       fi; won = 0 }
  :: atomic { alive[me] && move[me].phase == COMMITTING && MAY && !IN_DOUBT(me) ->
       HURT; roll_back(me); assert(KEPT) }               /* surely not done: the directory is away */
  AGAIN(alive[me] && move[me].phase == COMMITTED,
        tell(other, ACTIVATE, move[me].id, move[me].base + 1, 0, 0))
#ifndef NO_RECLAIM
  GIVE_UP(alive[me] && move[me].phase == COMMITTED, enter(me, RECLAIMING))
#endif
  :: atomic { alive[me] && move[me].phase == RECLAIMING ->
       swap_reclaim(me, other, won);
       assert(KEPT);
       if
       :: won && MAY -> HURT                             /* took effect; not known yet */
       :: won -> serve(me); tell(other, ABORT, move[me].id, 0, 0, 0); idle(me)
       :: !won -> idle(me); forget(me)                   /* the target has confirmed */
       fi; won = 0 }
  AGAIN(alive[me] && move[me].phase == RELEASING, tell(other, DROPPED, move[me].id, 0, 0, 0))
  GIVE_UP(alive[me] && move[me].phase == RELEASING, idle(me))

  /* ---- target in doubt: reads the row, confirms by a swap of its own */
#ifndef NO_ROW
  IN_TIME(alive[me] && copy[me].phase == READY && COMMITTED_HERE(me), live(me))
  /* it watches the row besides, and hears of the commit perhaps before its source does */
  :: atomic { alive[me] && copy[me].phase == READY && watches && SEEN(me) -> live(me) }
  /* it may throw its copy away at any time before LIVE, also because nobody has said more */
  IN_TIME(alive[me] && copy[me].phase == READY, forget(me); assert(KEPT))
  IN_TIME(alive[me] && copy[me].phase == LIVE && owner == me && !lost && nonce == copy[me].id,
       if
       :: MAY && !sure -> HURT; sure = 1                 /* took effect; not known yet */
       :: true -> sure = 1; serve(me)
       fi;
       assert(KEPT))
  IN_TIME(alive[me] && copy[me].phase == LIVE && !(owner == me && !lost && nonce == copy[me].id),
       forget(me); assert(KEPT))
#ifdef RESTLESS
  :: atomic { alive[me] && copy[me].phase == LIVE -> skip }
#endif
#endif
#ifdef NO_HOLD
  :: atomic { alive[me] && copy[me].phase == LIVE -> serve(me) }
#endif

  /* ---- what comes in */
  :: atomic { alive[me] &&
       ((me == 0 && nempty(to0)) || (me == 1 && nempty(to1))) ->
       if :: me == 0 -> to0?kind,id,e,d0,d1 :: me == 1 -> to1?kind,id,e,d0,d1 fi;
       if
       :: kind == FINAL ->
            if
            :: move[me].phase == IDLE &&
               (copy[me].phase == NONE || (copy[me].phase == READY && copy[me].id < id)) ->
                 copy[me].phase = READY; copy[me].epoch = e; copy[me].id = id;   /* was loaded */
                 copy[me].done[0] = d0; copy[me].done[1] = d1;
                 tell(other, PREPARED, id, e, 0, 0)
            :: copy[me].phase == READY && copy[me].id == id -> tell(other, PREPARED, id, e, 0, 0)
            :: copy[me].phase == NONE -> tell(other, REFUSE, id, 0, 0, 0)   /* could not be */
            :: else -> skip
            fi
       :: kind == PREPARED && move[me].phase == SHIPPING && id == move[me].id ->
            enter(me, COMMITTING)
       :: kind == REFUSE && move[me].phase == SHIPPING && id == move[me].id ->
            idle(me); serve(me)
       :: kind == ACTIVATE ->
            if
            :: copy[me].phase == READY && copy[me].id == id -> live(me)
            :: copy[me].phase == LIVE && copy[me].id == id -> tell(other, ACTIVATED, id, 0, 0, 0)
            :: else -> tell(other, DENIED, id, 0, 0, 0)  /* no such copy, or its move has ended */
            fi
       :: kind == ACTIVATED && id == move[me].id &&      /* it took effect, known here or not */
          (move[me].phase == COMMITTED || move[me].phase == COMMITTING) ->
            enter(me, RELEASING); move[me].doubt = 0; forget(me);
            tell(other, DROPPED, id, 0, 0, 0)
       :: kind == ACTIVATED && move[me].phase == RELEASING && id == move[me].id ->
            tell(other, DROPPED, id, 0, 0, 0)
       :: kind == DENIED && move[me].phase == COMMITTED && id == move[me].id ->
            enter(me, RECLAIMING)
       :: kind == DROPPED && copy[me].phase == LIVE && copy[me].id == id -> serve(me)
       :: kind == ABORT && copy[me].phase == READY && copy[me].id == id -> forget(me)
       :: else -> skip                                   /* late: dropped in a named branch */
       fi;
       kind = FINAL; id = 0; e = 0; d0 = 0; d1 = 0 }
  od
}

/* A request and its reply, or its repeat, in one step: what may happen between them (the copy
 * freezes, the node dies, the reply is lost) is covered by the choice to lose the reply. */
proctype Sender(byte s) {
  byte n; bit gone;
  do
  :: atomic { acked[s] == REQUESTS || lost -> break }
  :: atomic { acked[s] < REQUESTS && !lost && !gone && alive[at[s]] && TAKES(at[s]) ->
       n = at[s];
       if
#ifdef NO_RECORDS
       :: true ->
#else
       :: copy[n].done[s] == acked[s] ->                 /* the number that is expected */
#endif
            copy[n].done[s]++
#ifndef NO_RECORDS
       :: else -> skip                                   /* a repeat: answered from its record */
#endif
       fi;
       assert(copy[n].done[s] <= acked[s] + 1);          /* nothing runs twice */
       if
       :: copy[n].phase == SERVING ->                    /* the reply arrives */
            assert(copy[n].done[s] == acked[s] + 1);
            acked[s]++;
            assert(owner == n && !lost);                 /* one owner, and it is this one */
            assert(KEPT)
       :: copy[n].phase == LIVE -> skip                  /* held back */
       :: copy[n].phase == SERVING && MAY -> HURT        /* lost */
#ifdef NO_REPEAT
            ; gone = 1
#endif
       fi; n = 0 }
#ifndef NO_LOOKUP
  :: atomic { acked[s] < REQUESTS && !lost && !gone && at[s] != owner &&
       !(alive[at[s]] && (copy[at[s]].phase == SERVING || copy[at[s]].phase == LIVE)) ->
       at[s] = owner }                                   /* NotHere, Moved, or silence: look it up */
#endif
  od
}

/* One node may die at any step; who sees it marks the row as lost where the rules allow. */
proctype Crash() {
  if
  :: atomic { true -> alive[0] = 0; forget(0); idle(0) }
  :: atomic { true -> alive[1] = 0; forget(1); idle(1) }
  :: skip
  fi;
end:
  do
#ifndef NO_BURIAL
  :: atomic { !alive[owner] && !lost &&
       (sure || previous == NOBODY || !alive[previous] || move[previous].phase == IDLE) ->
       lost = 1; epoch = epoch + 1 }
  /* the commit came through after its source had died and the copy there had been given up */
  :: atomic { alive[owner] && !lost && !sure && !alive[previous] && copy[owner].phase == NONE ->
       lost = 1; epoch = epoch + 1 }
#endif
  :: atomic { lost -> break }
  od
}

init {
  atomic {
#ifdef PROGRESS
    if :: watches = 1 :: watches = 0 fi;
#endif
    copy[0].phase = SERVING; copy[0].epoch = 1;
    run Node(0); run Node(1); run Sender(0); run Sender(1); run Crash()
  }
}
